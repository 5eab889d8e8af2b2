"""Add the options of installed packages to Hydra's search path: entry points of the group `steer_heal.options`.

The value of such an entry point is the name of a top-level package whose folder has the layout described in
steer_heal/config/plugins.py. The package is not imported: a broken one must not break runs that do not use it.
"""

from importlib.metadata import entry_points
from importlib.util import find_spec

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class InstalledOptions(SearchPathPlugin):
    """Append one source per package after our own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for found in sorted(entry_points(group="steer_heal.options"), key=lambda entry: entry.module):
            spec = find_spec(found.module) if "." not in found.module else None  # a dotted name would import its parent
            if spec is not None and spec.submodule_search_locations:
                folder = next(iter(spec.submodule_search_locations))
                search_path.append(provider=f"package {found.module}", path=f"file://{folder}")
