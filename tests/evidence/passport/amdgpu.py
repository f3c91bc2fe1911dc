"""What AMD assembly says of its kernel: registers, spills, matrix instructions."""

import re


def resources(assembly: str) -> dict[str, int]:
    """From the metadata at the end of the text, and the matrix instructions counted in it."""

    def number(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly's metadata lacks .{name}")
        return int(found[1])

    return {
        "vgprs": number("vgpr_count"),
        "agprs": number("agpr_count"),
        "sgprs": number("sgpr_count"),
        "vgpr_spills": number("vgpr_spill_count"),
        "sgpr_spills": number("sgpr_spill_count"),
        "shared": number("group_segment_fixed_size"),
        "mfma": len(re.findall(r"^\s+v_s?mfma[a-z]*_", assembly, re.M)),
    }
