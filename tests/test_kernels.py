"""The kernels, compiled ahead of time for GPUs that are not there: the interpreter that the other
tests use on a CPU checks no types, knows no registers and runs one thread."""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# T4, A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.bool: "i1",
}


# ---------------------------------------------------------------- how each kernel is launched


def combine_loss_launches() -> Iterator[tuple[str, Callable]]:
    """On logits of each type, with and without a base, in aligned rows and others."""
    import ivl

    floats = (torch.bfloat16, torch.float16, torch.float32)
    ways = [*itertools.product(floats, (True, False), (32000, 32003))]
    ways.append((torch.bfloat16, True, 128256))  # Llama-3
    for dtype, has_base, V in ways:
        z_delta = torch.empty(3, V, dtype=dtype, device="meta")  # shapes and types are all it needs
        targets = torch.empty(3, dtype=torch.long, device="meta")
        z_base = torch.empty_like(z_delta) if has_base else None
        way = f"{NAMES[dtype]} {'with' if has_base else 'without'} base, {V} words"
        yield way, lambda: ivl.combine_loss_fused(z_base, z_delta, targets, targets >= 0, 0.5, 0.25)


def product_launches() -> Iterator[tuple[str, Callable]]:
    """Rows of each type, and one alone, by matrices whose rows are aligned and others."""
    from extras import int8

    floats = (torch.bfloat16, torch.float32)
    for dtype, m, r in itertools.product(floats, (4096, 4090), (1, 3)):
        x = torch.empty(r, m, dtype=dtype, device="meta")
        rounded = torch.empty(50, m, dtype=torch.int8, device="meta")
        scale = torch.empty(50, dtype=dtype, device="meta")
        yield f"{NAMES[dtype]}, {r} rows of {m}", lambda: int8.product(x, rounded, scale)


# each kernel by its name, and calls that launch it in all the ways there are; a function that only
# kernels call has none: tuple
KERNELS = {"_combine_loss": combine_loss_launches, "_product": product_launches}


class Spy:
    """In the place of a kernel: notes the launches, and the device that is the current one."""

    def __init__(self):
        self.launches = []
        self.devices = []
        self.current = None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *given, **options) -> None:
        self.launches.append((given, options))
        self.devices.append(self.current)

    @contextlib.contextmanager
    def switched_to(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.current = device
        yield
        self.current = before


# ---------------------------------------------------------------- the compiler, in its own process


def jit_functions(root: Path) -> dict:
    """All functions below `root` that Triton compiles, by name: (module, function)."""
    from triton.runtime.jit import JITFunction, KernelInterface

    found = {}
    sys.path.insert(0, str(root))
    for pattern in ("*.py", "extras/*.py", "experiments/*.py"):
        for path in sorted(root.glob(pattern)):
            if "triton" not in path.read_text(encoding="utf-8"):
                continue
            module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
            for name, thing in vars(module).items():
                # autotuning and heuristics are wrapped around a function
                while isinstance(thing, KernelInterface) and not isinstance(thing, JITFunction):
                    thing = thing.fn
                if isinstance(thing, JITFunction):
                    found[name] = module, thing
    return found


def compiled(kernel, given: tuple, options: dict, capability: int) -> dict:
    """What becomes of a kernel launched so: its IR and what ptxas says of it, or the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # types, constants, and what is known to be a multiple of 16, as Triton itself concludes them
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, given)) | {name: options[name] for name in names if name in options}
    options = {name: options[name] for name in options if name not in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif value == 1 and not isinstance(value, float):
            signature[parameter.name] = "constexpr"  # as the compiler in time has it: one row
            constants[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]

    ptxas = io.StringIO()
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        with contextlib.redirect_stdout(ptxas):
            binary = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
    except Exception as error:
        return dict(error=f"{type(error).__name__}: {error}")
    # what the GPU will run, where the test reads it
    found = dict(ttir=binary.asm["ttir"], ptxas=ptxas.getvalue())
    if capability == 90:
        found["sass"] = binary.asm["sass"]
    return found


def main(root: Path) -> None:
    """Prints as JSON the names of all kernels below `root`, and what becomes of their launches."""
    functions = jit_functions(root)
    results = {}
    for name, (module, function) in functions.items():
        spy = Spy()
        setattr(module, name, spy)
        ways = []
        for way, launch in KERNELS.get(name, tuple)():
            launch()
            ways.append(way)
        for way, (given, options) in zip(ways, spy.launches, strict=True):
            for capability in CAPABILITIES:
                results[f"{name}, sm_{capability}, {way}"] = compiled(
                    function, given, options, capability
                )
    print(json.dumps(dict(found=list(functions), results=results)))


# ---------------------------------------------------------------- what has come of it


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_DUMP_PTXAS_LOG": "1",  # what `ptxas -v` says is printed
    }
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, __file__, ROOT], env=environment, text=True, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_every_kernel_is_in_the_table(report):
    assert report["found"] and set(report["found"]) == set(KERNELS)


def test_every_kernel_compiles_for_every_gpu(report):
    for name in report["found"]:
        assert any(way.startswith(f"{name}, ") for way in report["results"])
    for way, result in report["results"].items():
        assert "error" not in result, f"{way}\n{result['error']}"


def test_every_kernel_keeps_to_its_registers(report):
    for way, result in report["results"].items():
        spills = re.findall(r"(\d+) bytes spill", result["ptxas"])
        assert spills and set(spills) == {"0"}, f"{way}\n{result['ptxas']}"


def test_the_target_s_logit_is_read_before_a_gradient_can_stand_there(report):
    """After the first loop's barriers, a slow thread could find what a fast one has written."""
    ways = {
        way: result
        for way, result in report["results"].items()
        if way.startswith("_combine_loss") and "bf16" in way
    }
    assert ways
    one_logit = r"tt\.load .*: !tt\.ptr<bf16>"  # of a block: tensor<4096x!tt.ptr<bf16>>
    for way, result in ways.items():
        before, _, after = result["ttir"].partition("scf.for")
        assert len(re.findall(one_logit, before)) == (2 if "with base" in way else 1), way
        assert not re.findall(one_logit, after), way
        assert "tt.store" not in before, way
        assert "tt.store" in after, way


def test_eight_bits_are_read_wide_and_made_floats_without_slow_instructions(report):
    """I2F, an integer to a float, runs at a fraction of the other instructions' pace: one for each
    weight would keep a large GPU from reading as fast as its memory can. (I2F.RP is a part of the
    division that tells a program its place.)
    """
    ways = {
        way: result["sass"]
        for way, result in report["results"].items()
        if way.startswith("_product, sm_90") and "of 4096" in way
    }
    assert ways
    for way, sass in ways.items():
        assert not re.search(r"I2F(?!\.RP)", sass) and "LDG.E.128" in sass, way


@pytest.mark.parametrize("module, kernel", [("ivl", "_combine_loss"), ("extras.int8", "_product")])
def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch, module, kernel):
    """Triton launches on the current device, wherever the tensors are."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spy = Spy()
    monkeypatch.setattr(importlib.import_module(module), kernel, spy)
    monkeypatch.setattr(torch.cuda, "device", spy.switched_to)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: spy.switched_to(tensor.device))
    for _, launch in KERNELS[kernel]():
        launch()
    assert spy.devices
    for device, (given, _) in zip(spy.devices, spy.launches):
        assert device == given[1].device


if __name__ == "__main__":
    main(Path(sys.argv[1]))
