"""`etr.table`, which tables below the layer need too, importable from where it was."""

from etr.table import Table, check_name, config_to_dict, config_to_text

__all__ = ["Table", "check_name", "config_to_dict", "config_to_text"]
