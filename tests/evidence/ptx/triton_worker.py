"""Subprocess of `toolchain`: reads ``target<TAB>request`` lines, writes one JSON file each."""

import base64
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_MODULES: dict[str, Any] = {}


def _load(path: str) -> Any:
    """The module of a file; a file of a package is loaded beside its siblings, without the package's parents."""
    if path not in _MODULES:
        folder, name = Path(path).parent, Path(path).stem
        if (folder / "__init__.py").exists():
            package = sys.modules.setdefault(folder.name, types.ModuleType(folder.name))
            package.__path__ = [str(folder)]
            name = f"{folder.name}.{name}"
        else:
            sys.path.insert(0, str(folder))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        _MODULES[path] = module
    return _MODULES[path]


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel; what `toolchain.Compiled` holds, as JSON types."""
    fn = getattr(_load(request["path"]), request["name"])
    order = {name: index for index, name in enumerate(fn.arg_names)}
    signature = {name: request["signature"][name] for name in fn.arg_names}
    attrs = {(order[n],): [["tt.divisibility", d]] for n, d in request["attrs"].items()}
    source = ASTSource(
        fn=fn, signature=signature, constexprs=request["constexprs"], attrs=attrs
    )  # fmt: skip
    arch = request["arch"]
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"]}
    kernel = triton.compile(source, target=target, options=options)
    metadata = kernel.metadata._asdict()
    kept = {k: v for k, v in metadata.items() if isinstance(v, (int, float, str, bool))}
    return {
        "ptx": kernel.asm["amdgcn" if amd else "ptx"],
        "binary": base64.b64encode(kernel.asm["hsaco" if amd else "cubin"]).decode(),
        "metadata": kept,
    }


def main() -> None:
    for line in sys.stdin.read().splitlines():
        target, _, request = line.partition("\t")
        try:
            result = compile_request(json.loads(request))
        except Exception as error:
            raise RuntimeError(f"while compiling {request}") from error
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        scratch.write_text(json.dumps(result))
        scratch.replace(path)


if __name__ == "__main__":
    main()
