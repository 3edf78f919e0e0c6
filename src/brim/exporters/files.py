"""Files written whole or not at all; `brim.files` holds it for the rooms beside this one too."""

from brim.files import write_text

__all__ = ["write_text"]
