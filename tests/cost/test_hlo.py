"""The reader of compiled programs: small ones compiled here, and lines recorded of other chips'."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from llava_mini_jax import sharding
from llava_mini_jax.cost import attention_kernels, hlo, hlo_work
from llava_mini_jax.cost.hlo_work import Work
from tests.conftest import ROOT

N = 64
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
PRODUCT = 2 * N**3


def recorded(name: str) -> str:
    return (ROOT / "tests" / "golden" / "hlo" / f"{name}.txt").read_text()


def text_of(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def works_of(function, *arguments) -> list[Work]:
    return hlo_work.works(hlo.parse(text_of(function, *arguments)))


def flops(works: list[Work]) -> float:
    return sum(work.times * work.flops for work in works)


def scanned(count: int):
    def run(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, length=count)[0]

    return run


def stack(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# --------------------------------------------------------------------------- loops and products


def test_products_of_a_loop_are_multiplied_out():
    assert flops(works_of(scanned(7), MATRIX, stack(7, N, N))) == 7 * PRODUCT


def test_loops_in_loops_are():
    def outer(x, ws):
        return jax.lax.fori_loop(0, 5, lambda _, x: scanned(3)(x, ws), x)

    assert flops(works_of(outer, MATRIX, stack(3, N, N))) == 15 * PRODUCT


def test_a_loop_whose_length_is_data_counts_once():
    def run(x, w, limit):
        return jax.lax.while_loop(
            lambda c: c[0] < limit, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )

    limit = jax.ShapeDtypeStruct((), jnp.int32)
    assert flops(works_of(run, MATRIX, MATRIX, limit)) == PRODUCT


def test_of_a_condition_the_branch_of_false_counts():
    def run(x, w, chosen):
        return jax.lax.cond(chosen, lambda: jnp.tanh(x @ w) @ w @ w, lambda: x @ w)

    assert flops(works_of(run, MATRIX, MATRIX, jax.ShapeDtypeStruct((), bool))) == PRODUCT


@pytest.mark.parametrize("equation", ["BTD,BSD->BTS", "BTNH,DNH->BTD", "AB,BC->AC"])
def test_products_are_those_of_the_equation(equation):
    inputs, _ = equation.split("->")
    sizes = dict(zip("ABCDHNST", (3, 5, 7, 11, 13, 17, 19, 23), strict=True))
    shapes = [stack(*(sizes[letter] for letter in part)) for part in inputs.split(",")]
    expected = 2
    for letter in set(inputs) - {","}:
        expected *= sizes[letter]
    assert flops(works_of(lambda a, b: jnp.einsum(equation, a, b), *shapes)) == expected


def test_a_loop_that_counts_in_twos_runs_half_as_often():
    program = hlo.parse(recorded("unrolled_loop"))
    assert hlo.runs(program) == {"main": 1, "body": 16}
    ones = hlo.parse(recorded("unrolled_loop").replace("constant(2)", "constant(1)"))
    assert hlo.runs(ones)["body"] == 31
    data = hlo.parse(recorded("unrolled_loop").replace("constant(31)", "parameter(1)"))
    assert hlo.runs(data)["body"] == 1


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="it has no ENTRY computation"):
        hlo.parse("HloModule m\n")


# ----------------------------------------------------------------- products that are convolutions


@pytest.mark.parametrize(
    "stride, front, dilated, spread", list(itertools.product((1, 3), (0, 2), (1, 4), (1, 2)))
)
def test_places_of_a_window_that_meet_data(stride, front, dilated, spread):
    size, kernel, out = 7, 5, 9
    data = {k * dilated for k in range(size)}
    places = [(stride * o + spread * k - front) in data for o in range(out) for k in range(kernel)]
    assert hlo_work._meetings((size, kernel, out), stride, front, dilated, spread) == sum(places)


def entry(*lines: str) -> hlo.Program:
    """A program of these instructions of an ENTRY."""
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule m\n\nENTRY %main (x: f32[1]) -> f32[1] {{\n{body}\n}}\n")


def test_a_batched_product_in_the_form_of_a_convolution():
    """As libtpu writes "BTD,BSD->BTS" with B = 32 in a window of which one place meets data."""
    program = entry(
        "%q = bf16[32,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "%k = bf16[32,576,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)",
        "ROOT %s = f32[32,128,576]{2,1,0:T(8,128)} convolution(%q, %k), "
        "window={size=32 stride=31 pad=0_0 lhs_dilate=32}, dim_labels=0bf_0oi->0bf",
    )
    assert flops(hlo_work.works(program)) == 2 * 32 * 128 * 576 * 64


def test_a_call_of_cublas_is_a_product():
    program = entry(
        "%a = bf16[128,512]{1,0} parameter(0)",
        "%b = bf16[256,512]{1,0} parameter(1)",
        "%y = (bf16[128,256]{1,0}, s8[4096]{0}) custom-call(%a, %b),"
        ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}',
        "ROOT %r = bf16[128,256]{1,0} get-tuple-element(%y), index=0",
    )
    assert flops(hlo_work.works(program)) == 2 * 128 * 256 * 512


# ------------------------------------------------------------------------------------------ bytes


def moved(function, *arguments) -> float:
    return sum(work.times * work.bytes for work in works_of(function, *arguments))


def test_a_loop_reads_the_slice_of_each_layer_and_not_the_stack():
    layers, size = 50, 4 * N * N
    found = moved(scanned(layers), MATRIX, stack(layers, N, N))
    # Each layer: its weight, and the activation in and out of product and tanh.
    assert layers * 3 * size <= found <= layers * 8 * size


def test_an_update_in_place_moves_what_is_updated():
    slots, steps = 4096, 10

    def run(cache, x):
        def add(i, cache):
            return jax.lax.dynamic_update_slice(cache, x * i, (i * 1, 0))

        return jax.lax.fori_loop(0, steps, add, cache)

    donated = jax.jit(run, donate_argnums=0).lower(stack(slots, N), stack(1, N)).compile()
    works = hlo_work.works(hlo.parse(donated.as_text()))
    assert sum(w.times * w.bytes for w in works) < 4 * slots * N


def test_what_is_sliced_behind_an_update_is_read_as_a_slice():
    """As XLA for GPUs reads a layer of a cache that it writes elsewhere."""
    lines = [
        "%sliced (c: f32[32,1024,64], u: f32[1,1,64]) -> f32[64,1,1024] {",
        "  %c = f32[32,1024,64]{2,1,0} parameter(0)",
        "  %u = f32[1,1,64]{2,1,0} parameter(1)",
        "  %i = s32[] constant(0)",
        "  %w = f32[32,1024,64]{2,1,0} dynamic-update-slice(%c, %u, %i, %i, %i)",
        "  %t = f32[64,32,1024]{2,1,0} transpose(%w), dimensions={2,0,1}",
        "  ROOT %s = f32[64,1,1024]{2,1,0} slice(%t), slice={[0:64], [3:4], [0:1024]}",
        "}",
        "",
        "ENTRY %main (c: f32[32,1024,64], u: f32[1,1,64]) -> f32[64,1,1024] {",
        "  %cache = f32[32,1024,64]{2,1,0} parameter(0)",
        "  %new = f32[1,1,64]{2,1,0} parameter(1)",
        "  ROOT %f = f32[64,1,1024]{2,1,0} fusion(%cache, %new), kind=kLoop, calls=%sliced",
        "}",
    ]
    layer, new = 4 * 64 * 1024, 4 * 64
    works = hlo_work.works(hlo.parse("\n".join(lines)))
    assert sum(w.bytes for w in works) == 2 * layer + new
    # A transpose that is kept as a whole reads and writes the whole.
    whole = "\n".join(lines).replace("ROOT %s", "%s").replace("%t = f32", "ROOT %t = f32")
    whole = whole.replace("ROOT %f = f32[64,1,1024]", "ROOT %f = f32[64,32,1024]")
    works = hlo_work.works(hlo.parse(whole.replace("  %s = ", "  %s.unused = ")))
    assert sum(w.bytes for w in works) >= 2 * 32 * layer


def test_memory_beside_the_main_one_moves_nothing():
    lines = [
        "%x = f32[1024,1024]{1,0:T(8,128)} parameter(0)",
        "%y = f32[1024,1024]{1,0:T(8,128)} add(%x, %x)",
        "ROOT %z = f32[1024,1024]{1,0:T(8,128)} add(%y, %y)",
    ]
    size = 4 * 2**20
    # An operand that is read twice by one instruction counts twice, as it is written.
    assert sum(w.bytes for w in hlo_work.works(entry(*lines))) == 6 * size
    in_vmem = [
        line.replace("%y = f32[1024,1024]{1,0:T(8,128)}", "%y = f32[1024,1024]{1,0:T(8,128)S(1)}")
        for line in lines
    ]
    assert sum(w.bytes for w in hlo_work.works(entry(*in_vmem))) == 3 * size


def test_a_prefetch_into_vmem_reads_once():
    program = entry(
        "%w = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)},"
        " u32[]{:S(2)}) copy-start(%w)",
        "ROOT %d = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)",
    )
    assert sum(w.bytes for w in hlo_work.works(program)) == 2 * 512 * 512


# -------------------------------------------------------------------------------- between devices


def test_collectives_of_a_loop_on_eight_devices():
    mesh = sharding.make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (8, N), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp"))
        )

        def each(x):
            def add(x, _):
                whole = jax.lax.all_gather(x, "fsdp", tiled=True)
                return x + whole.sum(0, keepdims=True), None

            x, _ = jax.lax.scan(add, x, length=6)
            return jax.lax.psum(x, "fsdp")

        works = works_of(
            jax.shard_map(each, in_specs=jax.P("fsdp"), out_specs=jax.P(), check_vma=False), x
        )
    found = [(wire.kind, work.times, wire.bytes) for work in works for wire in work.wires]
    assert sorted(found) == [("all-gather", 6, 4 * 8 * N), ("all-reduce", 1, 2 * 4 * N)]


def test_a_tpus_collective_in_two_fusions_counts_where_it_starts():
    works = hlo_work.works(hlo.parse(recorded("tpu_collectives")))
    found = {(w.instruction.name, v.kind): v.bytes for w in works for v in w.wires}
    assert found == {
        ("scattered", "reduce-scatter"): 2 * 2048 * 64,
        ("begun", "all-gather"): 2 * 64 * 2048,
    }


def test_a_gpus_collective_counts_what_is_gathered_of_several_arrays():
    program = entry(
        "%a = bf16[128,64]{1,0} parameter(0)",
        "%b = bf16[128,32]{1,0} parameter(1)",
        "%s = ((bf16[128,64]{1,0}, bf16[128,32]{1,0}), (bf16[1024,64]{1,0}, bf16[1024,32]{1,0}))"
        " all-gather-start(%a, %b), dimensions={0}",
        "ROOT %d = (bf16[1024,64]{1,0}, bf16[1024,32]{1,0}) all-gather-done(%s)",
    )
    ((wire,),) = [work.wires for work in hlo_work.works(program) if work.wires]
    assert (wire.kind, wire.bytes) == ("all-gather", 2 * 1024 * (64 + 32))


# ---------------------------------------------------------------------------------- fused kernels


@pytest.mark.parametrize("file, passes", [("cudnn", "fwd bwd"), ("splash", "fwd dkv dq")])
def test_fused_attention_is_known_by_its_calls(file, passes):
    """Of 2 rows, 512 queries, 32 heads of 128, grouped over 8 key heads of 1,088 keys."""
    works = hlo_work.works(hlo.parse(recorded(file)))
    found = [kernel for kernel in map(attention_kernels.kernel_of, works) if kernel]
    assert [(k.implementation, k.passes) for k in found] == [(file, p) for p in passes.split()]
    # Splash pads keys to 1,152 and skips what causality hides; cuDNN is given a dense mask here.
    keys = 1088 if file == "cudnn" else 1152 - 511 / 2
    one = 2 * 2 * 32 * 512 * keys * 128
    products = {"fwd": 2, "bwd": 5, "dkv": 4, "dq": 3}
    assert [k.flops for k in found] == [products[p] * one for p in passes.split()]


def test_one_row_has_no_axis_of_its_own_in_a_kernel():
    text = recorded("splash").replace("[2,32,", "[32,").replace("[2,8,1152,128]", "[8,1152,128]")
    found = map(attention_kernels.kernel_of, hlo_work.works(hlo.parse(text)))
    forward = next(kernel for kernel in found if kernel)
    assert forward.flops == 4 * 32 * 512 * (1152 - 511 / 2) * 128


def test_a_kernel_that_is_told_to_be_causal_computes_half():
    text = recorded("cudnn").replace("NO_MASK", "CAUSAL")
    text = text.replace("1088", "512")
    works = hlo_work.works(hlo.parse(text))
    forward = next(k for k in map(attention_kernels.kernel_of, works) if k)
    assert forward.flops == 4 * 2 * 32 * 128 * 512 * 513 / 2
