"""`mirl visualize CHECKPOINT IMAGE ...` shows what a pre-trained model reconstructs, as the picture grids of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirl.engine.checkpoints.kinds import PRETRAINED, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import Parser, seed
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write the grid, and print where it is and each pair's error on these images."""
    parser = Parser(
        prog="mirl visualize", description="Reconstruct images with a pre-trained model and write a picture grid."
    )
    add_checkpoint(parser, "a pre-trained model with its decoders")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--out", type=Path, default=Path("reconstructions.png"), help="the PNG file to write [reconstructions.png]"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the masks [0]")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"out is {arguments.out}, which exists: give another name or --overwrite")
    if arguments.out.suffix.lower() != ".png":
        raise UserError(f"out is {arguments.out}: give a name that ends in .png")
    missing = [path for path in arguments.images if not path.is_file()]
    if missing:
        raise UserError(f"image {missing[0]} does not exist: give paths of image files")

    found = given(arguments.checkpoint, arguments.which).require("mirl visualize", PRETRAINED)
    print(f"checkpoint {found}", flush=True)

    device = device_of_process(arguments.device)
    # These import torch and DALI, so they come late: a wrong path should be told at once.
    import torch

    from mirl.dataloaders import load_images
    from mirl.engine.checkpoints.pretrained import load_pretrained
    from mirl.engine.pretraining.pictures import NORMALISED, legend, reconstruct, save_grid
    from mirl.engine.training.noise import mask_noise

    model = load_pretrained(found.checkpoint, device=device)
    config = model.config
    images = load_images(
        [str(path) for path in arguments.images],
        image_size=(config.image_height, config.image_width),
        channels=config.channels,
        mean=config.mean,
        std=config.std,
    ).to(device)
    noise = mask_noise(arguments.seed, 0, 0, len(images), config.num_patches).to(device)
    titles, columns = reconstruct(model, images, noise)
    save_grid(arguments.out, titles, columns)
    with torch.no_grad():
        output = model(images, noise=noise)
    terms = ", ".join(f"{term:.4f}" for term in output.terms.tolist())
    print(f"wrote {arguments.out}: {len(images)} images, columns {', '.join(titles)}")
    print(f"columns: {'; '.join(legend(titles))}")
    print(f"masked-patch error {output.loss.item():.4f} (terms {terms})")
    if config.norm_pix:
        print(NORMALISED)
    return 0
