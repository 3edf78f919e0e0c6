"""What people call their hardware, and a machine as a fake driver describes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import BrimError, InvalidInput, MissingExtra, UnknownName
from brim.readers.hardware import read_cluster
from brim.tables.read import list_devices, match_device
from brim.units import GIB, MIB


@pytest.mark.parametrize("text", ["rtx-4090", "RTX 4090", "  rtx_4090 ", "NVIDIA GeForce RTX 4090", "4090"])
def test_a_card_has_many_names(text: str) -> None:
    cluster, sentence = read_cluster(text)
    assert cluster.device.name == "rtx-4090"
    assert cluster.num_devices == 1
    assert "rtx-4090" in sentence


def test_counts_and_nodes_multiply() -> None:
    cluster, sentence = read_cluster("h100:8", num_nodes=2)
    assert (cluster.devices_per_node, cluster.num_nodes, cluster.num_devices) == (8, 2, 16)
    assert sentence.startswith("8 x h100") and sentence.endswith("on each of 2 nodes")


@pytest.mark.parametrize("text", ["24GiB", "24 GiB", "24gib"])
def test_a_size_is_that_much_memory_and_no_speed(text: str) -> None:
    cluster, sentence = read_cluster(text)
    assert cluster.device.capacity_bytes == 24 * GIB
    assert cluster.device.memory_bytes_per_second is None
    assert "speed unknown" in sentence


def test_a_size_takes_a_count() -> None:
    assert read_cluster("24GiB:2")[0].devices_per_node == 2


@pytest.mark.parametrize("text", ["h100:0", "h100:-1", "h100:x", "h100:", "::", "h100:99999999999999", "h100:1e3"])
def test_impossible_counts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        read_cluster(text)


def test_a_typing_error_gets_the_close_match() -> None:
    with pytest.raises(UnknownName, match="rtx-5090"):
        read_cluster("rtx 5099")


@pytest.mark.parametrize("text", ["", "24", "9999999999TB", "nonsense" * 50])
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(UnknownName):
        read_cluster(text)


@pytest.mark.parametrize("text", ["0GiB", "0.0gb", "0 MB", "00b", "0GiB:2"])
def test_a_size_of_zero_is_called_zero(text: str) -> None:
    with pytest.raises(InvalidInput, match="the size of the GPU is zero"):
        read_cluster(text)


@pytest.mark.parametrize("nodes", [0, -1, 10**9])
def test_impossible_numbers_of_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(InvalidInput):
        read_cluster("h100", num_nodes=nodes)


@given(st.text(max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    if text.strip().lower().partition(":")[0] == "auto":
        return
    try:
        cluster, sentence = read_cluster(text)
    except BrimError as error:
        assert error.exit_code == 2
    else:
        assert cluster.num_devices >= 1 and sentence


class FakeNVMLError(Exception):
    """What every call of the fake raises on purpose."""


class FakeNvml(SimpleNamespace):
    """NVML as nvidia-ml-py wraps it; handles are dictionaries."""

    NVMLError = FakeNVMLError
    nvmlMemory_v2 = 2

    def __init__(self, *cards: dict) -> None:
        super().__init__(cards=cards, open=0)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict:
        return self.cards[index]

    def nvmlDeviceGetName(self, card: dict) -> str:
        return card["name"]

    def nvmlDeviceGetUUID(self, card: dict) -> bytes:
        return card["uuid"].encode()

    def nvmlDeviceGetCudaComputeCapability(self, card: dict) -> tuple[int, int]:
        return card["capability"]

    def nvmlDeviceGetMemoryInfo(self, card: dict, version: int | None = None) -> SimpleNamespace:
        total, free, reserved = card["total"], card["free"], card.get("reserved", 0)
        used = total - free - reserved
        if version is None:
            return SimpleNamespace(total=total, free=free, used=used + reserved)
        return SimpleNamespace(total=total, free=free, used=used, reserved=reserved)

    def nvmlDeviceGetMigMode(self, card: dict) -> tuple[int, int]:
        if "slices" not in card:
            raise FakeNVMLError("not supported")
        return (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, card: dict) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict, index: int) -> dict:
        if index >= len(card["slices"]):
            raise FakeNVMLError("not found")
        return card["slices"][index]


def card(name: str, total: float, free: float, capability: tuple[int, int] = (8, 9), **more: object) -> dict:
    uuid = f"GPU-{name.replace(' ', '')}-{free}"  # no hash: test ids must be the same in every process
    facts = {"name": name, "total": round(total * GIB), "free": round(free * GIB), "capability": capability}
    return facts | {"uuid": uuid} | more


RTX_4090 = card("NVIDIA GeForce RTX 4090", 23.99, 23.51, reserved=round(0.4 * GIB))
BUSY_4090 = card("NVIDIA GeForce RTX 4090", 23.99, 20.0, reserved=round(0.4 * GIB))
RTX_3060 = card("NVIDIA GeForce RTX 3060", 12.0, 11.5, (8, 6))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*cards: dict) -> FakeNvml:
        nvml = FakeNvml(*cards)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


def test_auto_plans_for_what_is_free_now(machine) -> None:
    nvml = machine(BUSY_4090)
    cluster, sentence = read_cluster("auto")
    assert cluster.device.name == "rtx-4090"
    assert cluster.device.plannable_bytes == 20 * GIB
    assert cluster.device.bf16_flops_per_second is not None
    assert "20.00 GiB free of 23.59 GiB: 3.59 GiB is taken by other programs now" in sentence
    assert nvml.open == 0


def test_an_idle_card_has_nothing_taken(machine) -> None:
    machine(card("NVIDIA GeForce RTX 4090", 23.99, 23.57, reserved=round(0.4 * GIB)))
    cluster, sentence = read_cluster("AUTO")
    assert "taken" not in sentence
    assert cluster.device.capacity_bytes == pytest.approx(23.59 * GIB, abs=MIB)


def test_the_weakest_of_unlike_cards_decides(machine) -> None:
    machine(RTX_4090, RTX_3060)
    cluster, sentence = read_cluster("auto")
    assert (cluster.device.name, cluster.devices_per_node) == ("rtx-3060-12gb", 2)
    assert "planned as the weakest, NVIDIA GeForce RTX 3060" in sentence


def test_of_like_cards_the_busiest_decides(machine) -> None:
    machine(RTX_4090, BUSY_4090)
    cluster, sentence = read_cluster("auto:2")
    assert cluster.device.plannable_bytes == 20 * GIB
    assert sentence.startswith("2 x NVIDIA GeForce RTX 4090 (NVML)")


def test_auto_cannot_give_more_than_there_are(machine) -> None:
    machine(RTX_4090)
    with pytest.raises(InvalidInput, match="asks for 2 GPUs; 1 visible"):
        read_cluster("auto:2")


@pytest.mark.parametrize(
    ("visible", "free_gib"),
    [("0", 23.51), ("1", 20.0), ("1,0", 20.0), (BUSY_4090["uuid"], 20.0), ("0,7,1", 23.51), ("0,-1", 23.51)],
)
def test_cuda_visible_devices_chooses(machine, monkeypatch: pytest.MonkeyPatch, visible: str, free_gib: float) -> None:
    machine(RTX_4090, BUSY_4090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_cluster("auto")[0].device.plannable_bytes == pytest.approx(free_gib * GIB, abs=1)


@pytest.mark.parametrize("visible", ["", "-1", "GPU-nonsense"])
def test_hidden_cards_are_an_error(machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    machine(RTX_4090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InvalidInput, match="hides all 1"):
        read_cluster("auto")


def test_an_instance_of_a_partitioned_card_counts_for_itself(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = card("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, 4.7) | {"uuid": "MIG-1"}
    large = card("NVIDIA A100-SXM4-40GB MIG 2g.10gb", 9.5, 9.4) | {"uuid": "MIG-2"}
    machine(card("NVIDIA A100-SXM4-40GB", 40, 39, (8, 0), slices=[small, large]))
    cluster, sentence = read_cluster("auto")
    assert (cluster.devices_per_node, cluster.device.plannable_bytes) == (1, round(4.7 * GIB))
    assert cluster.device.bf16_flops_per_second is None and "no speed estimate" in sentence
    assert cluster.device.compute_capability == (8, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert read_cluster("auto")[0].device.plannable_bytes == round(9.4 * GIB)


def test_a_card_the_table_does_not_know_has_no_rates(machine) -> None:
    machine(card("NVIDIA FutureCard 9000", 64, 63, (15, 0)))
    cluster, sentence = read_cluster("auto")
    assert cluster.device.memory_bytes_per_second is None
    assert cluster.device.plannable_bytes == 63 * GIB
    assert "no speed estimate" in sentence


def test_old_drivers_without_the_second_memory_call_work(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(BUSY_4090)
    monkeypatch.delattr(FakeNvml, "nvmlMemory_v2")
    assert read_cluster("auto")[0].device.plannable_bytes == 20 * GIB


def fake_torch(*, available: bool, hip: str | None = None) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 1, mem_get_info=lambda index: (60 * GIB, 64 * GIB),
        get_device_name=lambda index: "AMD Instinct MI210", get_device_capability=lambda index: (9, 0),
    )  # fmt: skip
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=hip))


def test_torch_answers_where_nvml_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(available=True, hip="6.2"))
    cluster, sentence = read_cluster("auto")
    assert (cluster.device.vendor, cluster.device.plannable_bytes) == ("amd", 60 * GIB)
    assert cluster.device.name == "mi210" and "(torch)" in sentence


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(available=False))
    with pytest.raises(InvalidInput, match="name one"):
        read_cluster("auto")


def test_no_library_to_ask_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"brim\[gpu\]"):
        read_cluster("auto")


def test_every_card_is_found_by_its_own_name() -> None:
    for device in list_devices():
        assert read_cluster(device.name)[0].device == device


@pytest.mark.parametrize(
    ("name", "capability", "gib", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.3, "a100-sxm4-80gb"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.4, "a100-sxm4-40gb"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.6, "h100-sxm5-80gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 16.0, None),
        ("NVIDIA GeForce RTX 4090", (8, 9), 48.0, None),
    ],
)
def test_drivers_names_are_matched_with_care(name: str, capability: tuple, gib: float, row: str | None) -> None:
    found = match_device(name, capability, round(gib * GIB))
    assert (found and found.name) == row
