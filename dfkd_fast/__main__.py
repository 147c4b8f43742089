"""``python -m dfkd_fast`` is ``dfkd-fast``."""

from .cli import main

main()
