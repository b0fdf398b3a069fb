"""Twenty steps of all tasks on every mesh of 1, 2, 4 and 8 fake devices, and on two processes: one curve of losses."""

import json

import pytest
from mesh_cases import collectives, largest_difference, run_processes, run_program

pytestmark = pytest.mark.slow

STEPS = 20
MESHES = [
    (2, {}),
    (2, {"fsdp": 2}),
    (4, {"fsdp": 2}),
    (4, {"fsdp": 2, "tensor": 2}),
    (8, {}),
    (8, {"fsdp": 8}),
    (8, {"fsdp": 2, "tensor": 2}),
]
PROGRAM = """
    import json, sys
    import mesh_cases

    mesh, wide, steps, joined, overrides = json.loads(sys.argv[1])
    if wide:
        mesh_cases.compute_in_float64()
    if joined:
        mesh_cases.join()
    mesh_cases.compile_quickly()
    mesh_cases.shrink_model()
    mesh_cases.print_losses(steps, **{f"mesh__{axis}": size for axis, size in mesh.items()}, **overrides)
"""


def curve(devices: int, mesh: dict[str, int], wide: bool, steps: int = STEPS, **overrides) -> list[dict[str, float]]:
    arguments = json.dumps([mesh, wide, steps, False, overrides])
    return json.loads(run_program(PROGRAM, devices, arguments, timeout=3000))


@pytest.fixture(scope="module", params=[True, False], ids=["float64", "float32"])
def expected(request) -> tuple[bool, list[dict[str, float]]]:
    return request.param, curve(1, {}, request.param)


@pytest.mark.parametrize(("devices", "mesh"), MESHES)
def test_a_mesh_has_the_losses_of_one_device(devices, mesh, expected):
    wide, one = expected
    assert_equal_curves(curve(devices, mesh, wide), one, wide)


def test_two_processes_have_the_losses_of_one(expected):
    wide, one = expected
    arguments = json.dumps([{"fsdp": 2}, wide, STEPS, True, {}])
    first, second = (
        json.loads(text.splitlines()[-1]) for text in run_processes(PROGRAM, 2, 2, arguments, timeout=3000)
    )
    assert first == second
    assert_equal_curves(first, one, wide)


def test_muon_on_a_mesh_has_the_losses_of_one_device():
    """Of split matrices too."""
    one, mesh = (
        curve(devices, sizes, True, 4, optimizer__kind="muon")
        for devices, sizes in ((1, {}), (8, {"fsdp": 2, "tensor": 2}))
    )
    assert_equal_curves(mesh, one, True)


def assert_equal_curves(rows: list[dict[str, float]], expected: list[dict[str, float]], wide: bool) -> None:
    losses, others = ([{"loss": row["loss"]} for row in curve] for curve in (rows, expected))
    differences = largest_difference(losses, others)
    if wide:
        assert max(differences) <= 1e-9, differences
        assert max(largest_difference(rows, expected)) <= 1e-8, "a metric other than the loss"
    else:
        assert differences[0] <= 1e-5, differences
        assert max(differences) <= 1e-3, differences


def test_bfloat16_on_a_mesh_is_near_one_device():
    """Sums are made in another order and each device rounds its own."""
    program = """
        import json, sys
        import mesh_cases

        mesh_cases.compile_quickly()
        mesh_cases.shrink_model()
        mesh = {f"mesh__{axis}": size for axis, size in json.loads(sys.argv[1]).items()}
        mesh_cases.print_losses(3, model__dtype="bfloat16", **mesh)
    """
    one, mesh = (
        json.loads(run_program(program, devices, json.dumps(sizes)))
        for devices, sizes in ((1, {}), (8, {"fsdp": 2, "tensor": 2}))
    )
    losses, others = ([{"loss": row["loss"]} for row in curve] for curve in (mesh, one))
    differences = largest_difference(losses, others)
    assert differences[0] <= 1e-3, differences
    assert max(differences) <= 2e-2, differences
    assert mesh[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-2)
    assert mesh != one, "the mesh was not used"


def test_gradients_of_products_are_scattered_and_then_summed_in_shards():
    """Over "fsdp" first: on a CPU an all-reduce in groups of 4 and a slice; then over "data", in pairs, of shards."""
    program = """
        import json
        import mesh_cases

        mesh_cases.compile_quickly()
        mesh_cases.shrink_model()
        names = ("image_ssl", "clip_ssl", "clip_geometry")
        programs = {}
        weights = {f"tasks__{name}__weight": 0.0 for name in names}
        mesh_cases.losses_of(1, programs, mesh__fsdp=4, **weights)
        print(json.dumps(programs))
    """
    programs = json.loads(run_program(program, 8))
    sums = [message for message in collectives(programs["caption"]) if message.kind == "all-reduce"]
    gradients = [message for message in sums if "transpose" in message.path and len(message.shape) > 1]
    scattered = [message for message in gradients if message.group == 4]
    in_shards = [message for message in gradients if message.group == 2]
    # 4 kernels of the backbone's blocks, 7 of the decoder's, the projector's 2 and the patches'.
    assert len(scattered) == len(in_shards) == 4 + 7 + 2 + 1
    assert sorted(message.size // 4 for message in scattered) == sorted(message.size for message in in_shards)
