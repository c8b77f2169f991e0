"""Where a model computes what there is a choice of, and in which shapes: seen in one forward pass of two images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mirl.engine.configuration.config import RunConfig
from mirl.engine.models.execution import Method, Regions
from mirl.engine.training.choices.declaration import Choice, Use

TRIAL_BATCH = 2


@dataclass(frozen=True)
class Place:
    """All modules that compute one thing in one shape; of the optimiser's step, the engine."""

    choice: Choice
    use: Use
    modules: tuple[Any, ...]

    @property
    def weight(self) -> int:
        """By which places of one choice are sorted: values that all the modules compute."""
        return self.use.volume * len(self.modules)

    @property
    def default(self) -> str:
        """The candidate that is used where nothing is chosen."""
        return self.choice.current(self.modules[0], self.use.in_region)


def find_places(
    model: Any, choices: Sequence[Choice], run: RunConfig, batch: int, device: torch.device, *, compiled: bool
) -> list[Place]:
    """The places of ``choices`` in ``model`` that the settings leave open, for steps of ``batch`` images.

    ``compiled``: regions will be compiled, so it matters what is in them. A module that computes several shapes counts
    with its largest. The order: outside of compiled regions before inside, where measuring takes longer; there, the
    place with most work of each choice, then the second of each, and so on. All ranks call this together: where their
    parameters are sharded the pass gathers them.
    """
    largest: dict[tuple[str, int, bool], tuple[Choice, nn.Module, Use]] = {}
    inside = False

    def marked(method: Method) -> Method:
        def run_inside(*arguments: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return method(*arguments)
            finally:
                inside = False

        return run_inside

    def note_for(choice: Choice, module: nn.Module) -> Callable[[Mapping[str, int | str], torch.dtype], None]:
        def note(sizes: Mapping[str, int | str], dtype: torch.dtype) -> None:
            if not choice.left_open(model, run, inside):
                return
            scaled = {key: batch if (key, value) == ("B", TRIAL_BATCH) else value for key, value in sizes.items()}
            use = Use(sizes=tuple(scaled.items()), dtype=dtype, in_region=inside)
            key = (choice.name, id(module), inside)
            if key not in largest or use.volume > largest[key][2].volume:
                largest[key] = (choice, module, use)

        return note

    undo = [
        end
        for choice in choices
        for module in model.modules()
        if (end := choice.watch(module, note_for(choice, module))) is not None
    ]
    regions, training = model.regions, model.training
    model.set_regions(Regions(marked, TRIAL_BATCH) if compiled else None)
    model.train()
    try:
        _trial_pass(model, device, compiled)
    finally:
        model.train(training)
        model.set_regions(regions)
        for end in undo:
            end()
    grouped: dict[tuple[str, Use, str], list[tuple[Choice, nn.Module]]] = {}
    for choice, module, use in largest.values():
        grouped.setdefault((choice.name, use, choice.current(module, use.in_region)), []).append((choice, module))
    places = [
        Place(members[0][0], use, tuple(module for _, module in members)) for (_, use, _), members in grouped.items()
    ]
    places.sort(key=lambda place: (-place.weight, place.use.key))
    by_choice = [[place for place in places if place.choice.name == choice.name] for choice in choices]
    in_turns = [place for row in itertools.zip_longest(*by_choice) for place in row if place is not None]
    return sorted(in_turns, key=lambda place: place.use.in_region)


def _trial_pass(model: Any, device: torch.device, compiled: bool) -> None:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (TRIAL_BATCH, config.image_height, config.image_width, config.channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    # Regions apply in training passes alone, which have a graph.
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.set_grad_enabled(compiled),
    ):
        model.trial_loss(images, generator)
