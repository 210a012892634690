"""An experiment again, of the configuration that a run keeps: the inverse of `describe`."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from etils import epath

import gddim.data
import gddim.nn
from gddim.data import LABEL
from gddim.errors import UserError
from gddim.experiment.config import Experiment, Sampling, Training
from gddim.experiment.options import UNGROUPED, find_spec
from gddim.experiment.spectrum import Spectrum
from gddim.experiment.workdir import OBJECTS, RECORDS, Remembered, describe, differences
from gddim.parallel import tell
from gddim.samplers.words import parse_sampler
from gddim.sde import AbstractLinearSDE
from gddim.sde.words import is_named, parse_process, process_name
from gddim.settings import MAY_CHANGE, WHEN
from gddim.storage import is_local

PARTS = ("sde", "net", "model", "train", "sampling", "eval", "seed")  # a mesh is a machine's, and a rule a function


def objects(experiment: Experiment) -> dict[str, str]:
    """What makes a description whole again: the word of the process, or its class where it has none, the class of the
    network's configuration, and the numbers of a spectrum.
    """
    word, std = process_name(experiment.sde), experiment.model.data_std
    found = {"sde": word if is_named(word) else _path(type(experiment.sde)), "net": _path(type(experiment.net))}
    if isinstance(std, Spectrum):
        found["data_std"] = base64.b64encode(np.asarray(std.rms, "<f8").tobytes()).decode()
    return found


def revived(config: dict, sde: AbstractLinearSDE | None = None, net: Any = None, data: Any = None) -> Experiment:
    """The experiment of a run, as far as its samples go: without its file, its data, its mesh.

    Nothing is imported that the configuration names. Raises `UserError` that says which object is wanted, a process, the
    configuration of a network or a data set, where it is none of this package, or another one than the run's was given.
    """
    config = _nested(config)
    for part, value in (("sde", sde), ("net", net)):
        if value is not None and (lines := differences({part: config[part]}, {part: describe(value)})):
            raise UserError(f"another {part} than the run's: {'; '.join(line.strip() for line in lines)}")
    shape = config.get(RECORDS, {}).get("shape") or (_data(config) if data is None else data).shape
    sampling = dict(config.get("sampling", {}))
    if not is_named(sampling.get("process", "")):
        sampling.pop("process", None)  # own; to read another's word would be to import what it names
    word = sampling.pop("sampler", None)
    if isinstance(word, str) and "table:" not in word:  # a file may name any other file
        with contextlib.suppress(UserError):  # the repr of one's own
            parse_sampler(word)
            sampling["sampler"] = word
    net, classes = _network(config) if net is None else net, config.get(RECORDS, {}).get("classes", 0)
    cond = getattr(data, "cond", None) or ({LABEL: np.int32(0)} if getattr(net, "classes", 0) and not classes else None)
    return Experiment(
        name=config.get("name", "run"),
        sde=_process(config) if sde is None else sde,
        net=net,
        data=Remembered(data, tuple(shape), classes, cond),
        model=_part(config, "model"),
        train=Training(augment=config.get("train", {}).get("augment", 0.0)),  # which tells the network
        sampling=_build(Sampling, sampling),
    )


def as_trained(experiment: Experiment, config: dict) -> Experiment:
    """The experiment of a file with what the run in a workdir tells in the place of what the file does.

    The mesh and the rule stay the file's, and so does the place of data that are no longer where the run had them. What
    cannot be made of a configuration stays too: it is compared with the run's afterwards, or, where it may differ, told.
    """
    config, ours, changes = _nested(config), _nested(describe(experiment)), {}
    makers = {"sde": _process, "net": _network}
    for part in PARTS:
        if part in config and config[part] != ours[part]:
            try:
                changes[part] = makers[part](config) if part in makers else _part(config, part)
            except UserError as error:
                if part in ("train", "sampling", "eval"):
                    tell(f"{part}: the run's cannot be read, and is that of the experiment's file: {error}")
    return dataclasses.replace(experiment, data=_located(experiment.data, config.get("data")), **changes)


def _nested(config: dict) -> dict:
    """A configuration with the options that stand in no group where their dataclass has them."""
    lifted = {field.name for field in dataclasses.fields(Sampling) if field.metadata.get(UNGROUPED)} & config.keys()
    return config | {"sampling": config.get("sampling", {}) | {name: config[name] for name in lifted}}


def _part(config: dict, name: str) -> Any:
    told = config.get(name, {})
    spectrum = config.get(OBJECTS, {}).get("data_std")
    if name == "model" and str(told.get("data_std")).startswith("spectrum "):
        if not spectrum:
            raise UserError(
                "its data_std is a spectrum, which the run does not keep: sample it by its experiment's file"
            )
        height, width = map(int, told["data_std"].split()[1].strip(",").split("x"))
        rms = np.frombuffer(base64.b64decode(spectrum), "<f8").reshape(height, width)
        told = told | {"data_std": Spectrum(tuple(map(tuple, rms.tolist())))}
    elif name == "model" and isinstance(told.get("data_std"), str):  # which on a command line would name a file
        raise UserError(f"its data_std is {told['data_std']:.80}, no number")
    return _revive(get_type_hints(Experiment, include_extras=True)[name], told)


def _process(config: dict) -> AbstractLinearSDE:
    told, kept = config["sde"], config.get(OBJECTS, {}).get("sde", "")
    classes = {each.__name__: each for each in _subclasses(AbstractLinearSDE) if each.__module__.startswith("gddim.")}
    found = classes.get(told["type"])
    candidates = [kept] if kept else ["psld", "langevin"]  # those of the package that are made by functions
    for word in filter(is_named, candidates):
        if describe(sde := parse_process(word)) == told:
            return sde
    if found is not None and kept in ("", _path(found)) and "_solution" not in told:
        return _build(found, told)
    raise UserError(f"its process, {_summary(told)}, was given as a Python object: give it as sde=")


def _network(config: dict) -> Any:
    told, kept = config["net"], config.get(OBJECTS, {}).get("net")
    found: Any = getattr(gddim.nn, told["type"], None)
    if found is None or not dataclasses.is_dataclass(found) or kept not in (None, _path(found)):
        raise UserError(f"its network, {_summary(told)}, is none of this package: give its configuration as net=")
    return _build(found, told)


def _data(config: dict) -> Any:
    told = config.get("data", {})
    found = getattr(gddim.data, told.get("type", ""), None)
    if found is None or not dataclasses.is_dataclass(found):
        raise UserError(f"its data, {_summary(told)}, were given as a Python object: give them as data=")
    return _build(found, told)


def _located(data: Any, told: dict | None) -> Any:
    """The data set of a file with the fields of the run's, where it is of one kind; those that say where it lies only if
    something is still there.
    """
    if not told or not dataclasses.is_dataclass(data) or isinstance(data, type) or type(data).__name__ != told["type"]:
        return data
    hints, changes = get_type_hints(type(data), include_extras=True), {}
    for field in dataclasses.fields(data):
        value = told.get(field.name)
        lost = field.metadata.get(WHEN) == MAY_CHANGE[WHEN] and (value is None or not _exists(value))
        if field.init and field.name in told and not lost:
            changes[field.name] = _revive(hints[field.name], value)
    return dataclasses.replace(data, **changes)


def _exists(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    path = epath.Path(value).expanduser()
    return not is_local(path) or path.exists()


def _build(kind: Any, told: dict) -> Any:
    """An object of a dataclass. Raises `UserError` for what it does not take."""
    hints = get_type_hints(kind, include_extras=True)
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(told.keys() - names - {"type"}):
        raise UserError(f"{kind.__name__} has no {', '.join(unknown)} in this release ({gddim.__version__})")
    try:
        return kind(**{name: _revive(hints[name], value) for name, value in told.items() if name != "type"})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{_summary(told)}: {str(error).splitlines()[0]}") from error


def _revive(kind: Any, told: Any) -> Any:
    """A value of a type, of what JSON holds of it."""
    inner = [each for each in get_args(kind) if each not in (Ellipsis, type(None))]
    if isinstance(told, str) and (spec := find_spec(kind)):
        return spec.instance_from_str([told])
    if told is None:
        return None
    if get_origin(kind) is tuple:
        return tuple(_revive(inner[0], each) for each in told)
    if get_origin(kind) in (Annotated, Union, UnionType):
        return _revive(inner[0], told)
    return _build(kind, told) if dataclasses.is_dataclass(kind) and isinstance(told, dict) else told


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _path(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _summary(told: dict) -> str:
    fields = (f"{name}={value}" for name, value in told.items() if name != "type")
    return f"{told.get('type')}({', '.join(fields)})"[:200]
