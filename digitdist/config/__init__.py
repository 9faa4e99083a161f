"""The configuration: a typed schema with its defaults, read from YAML files and ``key=value``, checked before anything starts.

To add a key, add a field to `schema.py`, nothing else.
"""

from digitdist.config.checks import expand_user, nearest_folder
from digitdist.config.command_line import Parser
from digitdist.config.keys import ENDS, KEYS, as_dict, describe_keys, result_changes
from digitdist.config.overrides import as_overrides
from digitdist.config.reading import (
    dump_config,
    load_config,
    load_stored_config,
    read_config,
    read_stored_config,
    shipped_configs,
    stored_values,
)
from digitdist.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SyncConfig,
    TrackingConfig,
)
from digitdist.config.targets import import_target
from digitdist.config.values import printable, shown

__all__ = [
    "ENDS",
    "KEYS",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "Parser",
    "ScheduleConfig",
    "SyncConfig",
    "TrackingConfig",
    "as_dict",
    "as_overrides",
    "describe_keys",
    "dump_config",
    "expand_user",
    "import_target",
    "load_config",
    "load_stored_config",
    "nearest_folder",
    "printable",
    "read_config",
    "read_stored_config",
    "result_changes",
    "shipped_configs",
    "shown",
    "stored_values",
]
