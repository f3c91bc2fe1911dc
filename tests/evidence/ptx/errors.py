"""What goes wrong: PTX that is not understood, and faults of a run."""

KINDS = {
    1: "out_of_bounds",
    2: "misaligned",
    3: "race",
    4: "async_race",
    5: "uninitialised",
    6: "divergent_barrier",
    7: "inactive_lane",
    8: "deadlock",
    9: "trap",
    10: "limit",
    11: "invalid",
}


class PtxError(ValueError):
    """PTX text that the emulator does not understand; the message names the line."""


class EmulatorError(RuntimeError):
    """A fault of a run: what (`kind`), where (`block`, `warp`, `lane`) and in which PTX line."""

    def __init__(
        self, kind: str, detail: str, block: tuple[int, int, int], warp: int, lane: int,
        line: int, text: str,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.detail = detail
        self.block = block
        self.warp = warp
        self.lane = lane
        self.line = line
        self.text = text
        super().__init__(f"{kind}: {detail} (block {block}, warp {warp}, lane {lane}; PTX line {line}: {text})")
