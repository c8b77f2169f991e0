"""The settings of a run as frozen dataclasses, and the command line that is made from them."""
