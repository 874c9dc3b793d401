"""The one family of errors: what was found, where it was found, and what to do about it."""

__all__ = ["ElfError", "KlpemuError", "RelocationError", "SymbolError"]


class KlpemuError(Exception):
    """Base of every error klpemu raises on purpose.

    `what` is what was found, `where` names the place (a file and the place in it, a guest address with its
    symbol), `advice` says what to do.  The text is always a single line.
    """

    def __init__(self, what: str, *, where: str = "", advice: str = "") -> None:
        self.what = what
        self.where = where
        self.advice = advice
        super().__init__(what, where, advice)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.advice:
            text = f"{text}; {self.advice}"
        return " ".join(text.split())


class ElfError(KlpemuError):
    """A file that is not an ELF object klpemu can read, or one that contradicts itself."""


class RelocationError(ElfError):
    """A relocation that is unknown, does not fit its field, or points outside its section."""


class SymbolError(KlpemuError):
    """A symbol that does not exist, or of which more than one exists and no position was given."""
