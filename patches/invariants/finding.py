"""What a check found, and what all checks of one step say together."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from elf.errors import KlpemuError
from emu.assembly import disassemble

__all__ = ["Finding", "Findings", "Report", "value_finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be: at which step, which invariant, where, and both versions of the
    bytes.

    `address` is guest virtual, `symbol` names it (a symbol, or the heap object it lies in).  The bytes are
    those of instructions if `is_code`, else of the value stored there.
    """

    invariant: str
    what: str
    address: int = 0
    symbol: str = ""
    expected: bytes = b""
    found: bytes = b""
    step: str = ""
    is_code: bool = False

    def __str__(self) -> str:
        step = f"{self.step}: " if self.step else ""
        place = " at " + " ".join(filter(None, (f"{self.address:#x}", self.symbol))) if self.address else ""
        return f"klpemu: {step}{self.invariant}: {self.what}{place}"

    def details(self) -> list[str]:
        """The bytes expected and found: instructions with their disassembly, anything else as a number."""
        lines = []
        for name, data in (("expected", self.expected), ("found", self.found)):
            if data and self.is_code:
                text = "; ".join(str(each) for each in disassemble(data, self.address))
                lines.append(f"  {name:8} {data.hex(' ')}  {text}")
            elif data:
                lines.append(f"  {name:8} {data.hex(' ')}  {int.from_bytes(data, 'little'):#x}")
        return lines


def value_finding(
    invariant: str, what: str, address: int, symbol: str, expected: int, found: int, size: int = 8
) -> Finding:
    """A finding about a number of `size` bytes in guest memory; negative ones are signed."""
    bound = 1 << 8 * size
    wanted, actual = ((value % bound).to_bytes(size, "little") for value in (expected, found))
    return Finding(invariant, what, address, symbol, wanted, actual)


class Findings(KlpemuError):  # noqa: N818  (it carries findings, it is not one more error)
    """Raised by `Report.raise_for_findings`; `report` has them all."""

    def __init__(self, report: "Report") -> None:
        self.report = report
        more = f" (and {len(report.findings) - 1} more)" if len(report.findings) > 1 else ""
        super().__init__(f"{report.findings[0]}{more}")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of verifying one step: how often each invariant was checked, and what was found."""

    step: str
    checks: dict[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def total(self) -> int:
        """Number of single checks made."""
        return sum(self.checks.values())

    @property
    def holds(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def raise_for_findings(self) -> None:
        """Raise `Findings` unless everything holds."""
        if self.findings:
            raise Findings(self)

    @staticmethod
    def merged(reports: Iterable["Report"], step: str = "") -> "Report":
        """All reports as one."""
        checks: dict[str, int] = {}
        findings: list[Finding] = []
        for report in reports:
            for name, count in report.checks.items():
                checks[name] = checks.get(name, 0) + count
            findings += report.findings
        return Report(step, checks, tuple(findings))
