"""Checks before anything starts: every cell's configuration, the models it names, and the folders to be written."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from loguru import logger
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from steer_heal.config import CONF, LISTS, ConfigError, build
from steer_heal.config.errors import one_line
from steer_heal.config.files import decoded, parsed
from steer_heal.config.plugins import adopt
from steer_heal.system.paths import expanded
from steer_heal.system.signals import block
from steer_heal.system.terminal import bar

if TYPE_CHECKING:  # slow to import, and a number of cells is told first
    from steer_heal.experiment import Experiment

OURS = "hydra_plugins.steer_heal_plugins.launchers."
HERE = ("hydra._internal.core_plugins.", f"{OURS}Local", f"{OURS}Parallel")  # launchers that run cells on this machine


class Cell(NamedTuple):
    """One configuration of a sweep, or the only one."""

    name: str  # its overrides; "" for a single run
    typed: Sequence[str]  # its overrides
    choices: Mapping[str, Any]  # group -> chosen option
    config: DictConfig  # without Hydra's own node


def check_run(config: DictConfig) -> None:
    """Check a single run. Raises ConfigError."""
    HydraConfig.instance().set_config(config)  # resolves ${hydra:...}
    cell = Cell("", _typed(config), config.hydra.runtime.choices, _without_hydra(config))
    _check_all(config, [cell], Path(config.hydra.run.dir), "hydra.run.dir")


class Checked(NamedTuple):
    """A sweep whose cells are valid."""

    groups: list[list[str]]  # overrides of the cells, equivalent ones together: each group is computed once
    distinct: list[Experiment]  # the first of each group

    @property
    def equivalent(self) -> list[list[str]]:
        """The groups of several cells."""
        return [group for group in self.groups if len(group) > 1]


def check_sweep(config: DictConfig) -> Checked:
    """Check every cell of a sweep, given on the command line or in YAML. Raises ConfigError, naming the cell."""
    HydraConfig.instance().set_config(config)
    cells = cells_of(config)
    composed = _composed(config, GlobalHydra.instance().config_loader(), cells)
    with bar("checking cells", len(cells)) as advance:
        found = _check_all(config, composed, Path(config.hydra.sweep.dir), "hydra.sweep.dir", advance)
    groups: dict[str, list[str]] = {}
    distinct: dict[str, Experiment] = {}
    for cell, experiment in zip(cells, found, strict=True):
        fingerprint = json.dumps(experiment.fingerprint, sort_keys=True)
        groups.setdefault(fingerprint, []).append(" ".join(cell))
        distinct.setdefault(fingerprint, experiment)
    return Checked(list(groups.values()), list(distinct.values()))


def cells_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each cell of a sweep. Raises HydraException for what cannot be read."""
    loader = GlobalHydra.instance().config_loader()
    written = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*written, *_typed(config)])
    return [list(cell) for cell in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]


def whole_cells(
    config: DictConfig, loader: ConfigLoader, cells: Sequence[Sequence[str]], first: int
) -> Iterator[DictConfig]:
    """Yield each cell's configuration with Hydra's node: its output folder, and its number, counted from `first`."""
    for number, cell in enumerate(_composed(config, loader, cells, with_hydra=True)):
        whole = cell.config
        whole.hydra.sweep.dir = str(Path(str(config.hydra.sweep.dir)).absolute())
        if whole.hydra.job.chdir:  # otherwise each cell would have its own store
            whole.runtime.store = str(Path(expanded(str(whole.runtime.store))).absolute())
        with open_dict(whole.hydra.job), open_dict(whole.hydra.runtime):
            whole.hydra.job.id = str(first + number)
            whole.hydra.job.num = first + number
            whole.hydra.overrides.task = list(cells[number])
            style = whole.hydra.job.config.override_dirname
            whole.hydra.job.override_dirname = get_overrides_dirname(
                overrides=OverridesParser.create(config_loader=loader).parse_overrides(list(cells[number])),
                kv_sep=style.kv_sep, item_sep=style.item_sep, exclude_keys=list(style.exclude_keys),
            )  # fmt: skip
            HydraConfig.instance().set_config(whole)
            OmegaConf.set_readonly(whole.hydra, False)
            whole.hydra.sweep.subdir = str(whole.hydra.sweep.subdir)
            whole.hydra.runtime.output_dir = str(Path(whole.hydra.sweep.dir, whole.hydra.sweep.subdir).absolute())
        yield whole
    HydraConfig.instance().set_config(config)


def _typed(config: DictConfig) -> list[str]:
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${lam} is resolved in each cell
    assert isinstance(given, list)
    return list(map(str, given))


def _composed(
    config: DictConfig, loader: ConfigLoader, cells: Sequence[Sequence[str]], with_hydra: bool = False
) -> Iterator[Cell]:
    """Compose the configuration of each cell.

    Like Hydra, this merges the files of the chosen options first and then sets single values. Merging takes nearly all
    the time, so it is done once for all cells that choose the same options; most of the rest is copying, so cells
    share the lists that none of them changes.
    """
    parser = OverridesParser.create(config_loader=loader)
    together: dict[tuple[str, ...], tuple[Any, DictConfig, dict[str, list[ListConfig]]]] = {}
    is_group = functools.cache(lambda key: bool(loader.get_group_options(key)))
    for cell in cells:
        name = " ".join(cell)
        try:
            parsed: list[Override] = parser.parse_overrides(list(cell))
            choices = tuple(o.input_line for o in parsed if is_group(o.key_or_group))
            values = [o for o in parsed if o.input_line not in choices]
            if choices not in together:
                whole = loader.load_sweep_config(config, list(choices))
                merged = whole if with_hydra else _without_hydra(whole)
                together[choices] = whole.hydra.runtime.choices, merged, _constant_lists(merged)
            chosen, shared, lists = together[choices]
            set_here = {o.key_or_group.split(".")[0] for o in values}
            kept = [one for group, some in lists.items() if group not in set_here for one in some]
            composed = copy.deepcopy(shared, {id(one): one for one in kept})
            ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        except (HydraException, OmegaConfBaseException) as error:
            raise _of(name, error) from error
        yield Cell(name, cell, chosen, composed)


def _constant_lists(config: DictConfig) -> dict[str, list[ListConfig]]:
    """Lists without interpolations at the first level of each group, such as `contexts.prompts`."""
    found: dict[str, list[ListConfig]] = {}
    for key in config:
        if isinstance(group := config._get_node(key), DictConfig) and key != "hydra":
            nodes = [group._get_node(field) for field in group]
            lists = [one for one in nodes if isinstance(one, ListConfig) and not one._is_none()]
            found[str(key)] = [one for one in lists if "${" not in str(OmegaConf.to_container(one, resolve=False))]
    return found


def _without_hydra(config: DictConfig) -> DictConfig:
    alone = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(alone, True)
    return alone


def expand_folder(config: DictConfig, kind: Literal["run", "sweep"]) -> None:
    """Replace `~` at the beginning of `hydra.<kind>.dir`. Raises ConfigError if there is no such user."""
    HydraConfig.instance().set_config(config)  # resolves ${hydra:...}
    given = str(config.hydra[kind].dir)
    try:
        found = expanded(given)
    except ValueError as error:
        raise ConfigError(f"hydra.{kind}.dir={given!r} is not allowed: must be {error}") from None
    if found != given:
        with read_write(config.hydra):
            config.hydra[kind].dir = found


def _check_all(
    config: DictConfig, cells: Iterable[Cell], folder: Path, field: str,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Experiment]:  # fmt: skip
    """Build all cells, then prepare each model and check each folder once. Returns the cells."""
    with block():
        from steer_heal.experiment import Experiment

    adopt(OmegaConf.to_container(config.hydra.runtime.config_sources, resolve=True))  # type: ignore[arg-type]
    here = str(config.hydra.launcher._target_).startswith(HERE)
    prepared, built = set[str](), list[Experiment]()
    later: list[tuple[str, Experiment]] = []
    doubts: dict[str, None] = {}
    for name, typed, choices, composed in cells:
        try:
            _one_option_each(choices, composed)
            _only_chosen(typed, composed)
            experiment = build(composed)
        except ConfigError as error:
            raise _of(name, _of_preset(error, choices.get("experiment"), config)) from error
        assert isinstance(experiment, Experiment)
        doubts |= dict.fromkeys(experiment.doubts())
        built.append(experiment)
        needs = json.dumps([experiment.preparation_key(), str(experiment.runtime.store)], sort_keys=True)
        if needs not in prepared:
            prepared.add(needs)
            later.append((name, experiment))
        advance(1)
    for name, experiment in later:
        try:
            experiment.prepare(here)
            writable(experiment.runtime.store, "runtime.store")
        except ConfigError as error:
            raise _of(name, error) from error
    writable(folder, field)
    for doubt in doubts:
        logger.warning("{}", doubt)
    return built


def _one_option_each(choices: Mapping[str, Any], config: DictConfig) -> None:
    """Raise ConfigError for a list in a group that takes one option: Hydra would merge the listed files into one."""
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        if group in config and group not in choices and group not in LISTS:
            raise ConfigError(f"'{group}=[...]': one option, not a list of them; to sweep add -m and write {group}=a,b")


def _only_chosen(typed: Sequence[str], config: DictConfig) -> None:
    """Raise ConfigError for a value typed for an option of a list that is not chosen; a preset may hold such values."""
    for group in LISTS:
        for name, option in (config.get(group) or {}).items():
            pattern = rf"\+*{group}\.{name}[.=]"
            if isinstance(option, DictConfig) and "_target_" not in option and any(re.match(pattern, t) for t in typed):
                chosen = [*(key for key, each in config[group].items() if "_target_" in each), name]
                raise ConfigError(f"{group}.{name}: {name} is not chosen; add it, '{group}=[{','.join(chosen)}]'")


def _of_preset(error: ConfigError, preset: Any, config: DictConfig) -> ConfigError:
    """The error, with the preset that sets an unknown field, most likely one of an option that is not chosen now."""
    files = [Path(source.path, f"experiment/{preset}.yaml") for source in config.hydra.runtime.config_sources]
    for file in files if error.unknown else ():
        if file.is_file() and OmegaConf.select(parsed(decoded(file.read_bytes(), str(file)), str(file)), error.unknown):
            field = error.unknown
            return ConfigError(f"{error}; experiment={preset} sets it: to leave it out, add '~{field}'", field)
    return error


def writable(folder: Path, field: str) -> None:
    """Raise ConfigError unless `folder`, or its nearest existing parent, can be written to. Creates no folder."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(f"{field}={str(folder)!r} cannot be written: {error.strerror}") from error


def _of(name: str, error: Exception) -> ConfigError:
    """The error for a cell, prefixed with its name unless the line already begins with it."""
    line = one_line(error)
    return ConfigError(f"{name}: {line}" if name and not line.startswith(name) else line)
