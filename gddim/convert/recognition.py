"""Which format a published checkpoint has, by what is in it."""

from pathlib import Path
from typing import Literal

from etils import epath

from gddim.convert.cld_sgm import read_cld_sgm
from gddim.convert.diffusers import read_diffusers
from gddim.convert.edm import read_edm
from gddim.convert.published import Published
from gddim.convert.score_sde import Process, State, read_score_sde
from gddim.errors import UserError, place
from gddim.storage import is_local
from gddim.torch_reader import refusing

KINDS = "EDM pickle, score_sde or CLD-SGM .pth, or diffusers UNet2DModel folder"


def is_flax(source: epath.PathLike) -> bool:
    """Whether a file begins as a msgpack of a few names does, as the states of gDDIM; a pickle or an archive does not."""
    path = place(source)
    if path.is_dir():
        return False
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return len(first) == 1 and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def read(
    source: epath.PathLike,
    weights: Literal["ema", "raw"] = "ema",
    process: Process | None = None,
    size: int | None = None,
) -> Published:
    """A published checkpoint, whichever of the formats it has; nothing in it is imported or run.

    EDM's network snapshot (.pkl), a training state of score_sde_pytorch or of CLD-SGM (.pth), or a folder of diffusers'
    UNet2DModel. `weights`: the averaged parameters or the raw ones, where a file has both. Where a training state does not
    tell, `process`: which one a network of score_sde is of, and `size`: the height of the images, by default as published.

    Raises `UserError`, in one line, for all else: a state of gDDIM among it, which does not tell its experiment.
    """
    found = parse(source, weights, process, size)
    found.model  # noqa: B018  what does not fit is refused now
    return found


def parse(
    source: epath.PathLike,
    weights: Literal["ema", "raw"] = "ema",
    process: Process | None = None,
    size: int | None = None,
) -> Published:
    """`read`, before it is known whether the parameters are those of the network that the checkpoint describes."""
    path = epath.Path(source).expanduser()
    if not is_local(path):
        raise UserError(f"{path}: copy it to a local disk first; from a bucket only states of gDDIM are read")
    path = Path(path)
    with refusing(path, KINDS):
        return _read(path, weights, process, size)


def _read(path: Path, weights: Literal["ema", "raw"], process: Process | None, size: int | None) -> Published:
    reader = read_diffusers if path.is_dir() else read_edm
    if reader is read_edm:
        with path.open("rb") as file:
            first = file.peek(2)[:2]
            if not (first[:1] == b"\x80" and first[1:] > b"\x02"):  # PyTorch's own pickles are of protocol 2
                state = State.read(file, weights, size)
                if state.inputs == 2 * state.outputs and process is None:
                    return read_cld_sgm(state, path)
                if state.inputs == state.outputs:
                    return read_score_sde(state, path, process)
                raise UserError(f"its network takes {state.inputs} channels and returns {state.outputs}")
    if weights != "ema" or process is not None or size is not None:
        raise UserError("it has one set of weights, tells process and size: leave out --weights, --process and --size")
    return reader(path)
