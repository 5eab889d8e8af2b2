"""Puts the options of installed packages on Hydra's search path: entry points of the group `steer_heal.options`.

The value of such an entry point is the name of a package whose folder is laid out as steer_heal/options.py says.
"""

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class InstalledOptions(SearchPathPlugin):
    """One source a package, after our own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for found in sorted(entry_points(group="steer_heal.options"), key=lambda entry: entry.module):
            search_path.append(provider=f"package {found.module}", path=f"pkg://{found.module}")
