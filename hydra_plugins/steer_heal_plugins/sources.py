"""Hydra's sources of YAML files, with the files read and checked by steer_heal/config/files.py.

Hydra keeps the first class that is registered for a scheme, and accepts its own afterwards only if that has the same
name; it imports the plugins before it registers any.
"""

import os
from importlib import resources

from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource

OF_HYDRA = "hydra.conf"


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file of the folder. Raises ConfigError, naming the file, if it cannot be used."""
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        if not os.path.isfile(path):
            raise ConfigLoadError(f"Config not found : {path}")
        with open(path, "rb") as file:
            return _result(self, config_path, file.read(), path)


class ImportlibResourcesConfigSource(importlib_resources_config_source.ImportlibResourcesConfigSource):
    """A package."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file of the package. Raises ConfigError, naming the file, if it cannot be used."""
        if self.path == OF_HYDRA:
            return super().load_config(config_path)
        file = resources.files(self.path).joinpath(self._normalize_file_name(config_path))
        if not file.is_file():
            raise ConfigLoadError(f"Config not found : {config_path}")
        return _result(self, config_path, file.read_bytes(), str(file))


def _result(source: ConfigSource, config_path: str, data: bytes, shown: str) -> ConfigResult:
    from steer_heal.config import ConfigError
    from steer_heal.config.files import check_place, decoded, parsed

    text = decoded(data, shown)
    try:
        header = ConfigSource._get_header_dict(text)
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from None
    config = parsed(text, shown)
    check_place(config, header.get("package"), config_path, shown)
    return ConfigResult(config=config, path=source.full_path(), provider=source.provider, header=header)


for kind in (FileConfigSource, ImportlibResourcesConfigSource):
    SourcesRegistry.instance().register(kind)
