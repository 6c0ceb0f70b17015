"""Cluster files: what they hold, what they mean, and what is refused in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.clusters import (
    CLUSTERS,
    KV_SHARE,
    USABLE_SHARE,
    find_geometry,
    fitting_bytes,
    load_cluster,
    load_geometry,
    load_profile,
    scaled,
    weights_ratio,
)
from maestro_backend.simulator import Cluster, SimDevice

SMALL = """
name: small
nodes:
  - name: a
    profile: a100-80g
    host_memory: 512GiB
    disk: 6GB/s
    devices:
      - {count: 2, static: llama-3.1-8b, models: [llama-3.1-8b, llama-3.2-3b]}
"""


def devices(cluster: Cluster) -> list[SimDevice]:
    return [device for node in cluster.nodes for device in node.devices]


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, old: str, new: str) -> str:
    """What is said of the small cluster once `old` is `new`."""
    assert old in SMALL
    path = written(folder, SMALL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_weights_of_a_shipped_cluster_are_half_as_much_again_as_fits(name: str) -> None:
    assert weights_ratio(load_cluster(name)) == pytest.approx(1.5, abs=0.1)


def test_what_fits_is_the_usable_memory_less_kv_and_processes(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, SMALL))
    gib = 2**30
    one = (1 - KV_SHARE) * USABLE_SHARE * 79.3 * gib - 2 * 1.5 * gib
    assert fitting_bytes(cluster) == pytest.approx(2 * one)
    both = load_geometry("llama-3.1-8b").weights_bytes + load_geometry("llama-3.2-3b").weights_bytes
    assert weights_ratio(cluster) == pytest.approx(both / one)


def test_the_paper_cluster() -> None:
    cluster = load_cluster("paper")
    found = devices(cluster)
    assert [device.profile.name for device in found] == ["a100-80g"] * 8
    assert len(cluster.models) == 7 and set(cluster.kv_bytes) == set(cluster.models)
    held = Counter(model for device in found for model in device.models)
    assert min(held.values()) >= 2
    static = Counter(device.static for device in found)
    assert sorted(static.values()) == [1, 1, 1, 1, 1, 1, 2] and set(static) == set(cluster.models)


def test_in_the_paper_cluster_two_14b_fit_beside_each_other_with_caches_of_one_size() -> None:
    cluster = load_cluster("paper")
    together = [
        device
        for device in devices(cluster)
        if {"qwen2.5-14b", "qwen2.5-coder-14b"} <= set(device.models)
    ]
    assert together
    for device in together:
        pair = ("qwen2.5-14b", "qwen2.5-coder-14b")
        taken = sum(cluster.models[m].weights_bytes + cluster.kv_bytes[m] for m in pair)
        taken += device.profile.residual_bytes * len(device.models)
        assert taken <= device.profile.capacity_bytes


def test_three_clusters() -> None:
    cluster = load_cluster("three-clusters")
    assert sum(device.devices for device in devices(cluster)) == 64
    assert {node.cluster: node.rtt_s for node in cluster.nodes} == {
        "near": pytest.approx(0.0002),
        "middle": pytest.approx(0.012),
        "far": pytest.approx(0.045),
    }
    groups = [device for device in devices(cluster) if device.devices > 1]
    assert [(group.name, group.devices, group.models) for group in groups] == [
        ("gpu0-3", 4, ("llama-3.1-70b",))
    ]
    assert {model for device in devices(cluster) for model in device.models} == set(cluster.models)
    assert set(load_cluster("paper").models) < set(cluster.models)
    assert len({node.name for node in cluster.nodes}) == len(cluster.nodes) == 8


def test_names_count_and_defaults(tmp_path: Path) -> None:
    text = SMALL.replace("name: a\n", "name: a\n    count: 2\n").replace("name: small", "name: s")
    cluster = load_cluster(written(tmp_path, text))
    assert [node.name for node in cluster.nodes] == ["a-0", "a-1"]
    assert [device.name for device in cluster.nodes[0].devices] == ["gpu0", "gpu1"]
    assert (cluster.max_num_seqs, cluster.max_batched_tokens, cluster.kv_bytes) == (64, 8192, {})
    node = cluster.nodes[0]
    assert (node.cluster, node.rtt_s, node.disk, node.host_bytes) == ("local", 0, 6e9, 512 * 2**30)


def test_a_file_may_extend_and_replace_what_is_shipped(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "profiles:\n  mine: {like: h100, step: 4ms, bandwidth: 2.5TB/s, flops: 400GFLOPS}\n"
    )
    text = SMALL.replace("profile: a100-80g", "profile: mine").replace(
        "name: small",
        "name: small\ncatalogues: [mine.yaml]\n"
        "models:\n  llama-3.2-3b: {like: llama-3.2-3b, max_model_len: 8192}",
    )
    cluster = load_cluster(written(tmp_path, text))
    profile = devices(cluster)[0].profile
    assert profile == replace(
        load_profile("h100"), name="mine", step_s=0.004, bandwidth=2.5e12, flops=4e11
    )
    assert cluster.models["llama-3.2-3b"].max_model_len == 8192


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("static:", "statik:", "FILE: nodes.0.devices.0.statik: unknown key; did you mean static?"),
        (
            "profile: a100-80g",
            "profile: a100-80gb",
            "FILE: nodes.0.devices.0.profile: there is no 'a100-80gb'; did you mean a100-80g?",
        ),
        (
            "[llama-3.1-8b, llama-3.2-3b]",
            "[llama-3.1-8b, llama-3.2-3]",
            "FILE: nodes.0.devices.0.models: there is no 'llama-3.2-3'; did you mean llama-3.2-3b?",
        ),
        (
            "static: llama-3.1-8b",
            "static: qwen2.5-7b",
            "FILE: nodes.0.devices.0.static: 'qwen2.5-7b' is not one of its models"
            " (known: llama-3.1-8b, llama-3.2-3b)",
        ),
        (
            "[llama-3.1-8b, llama-3.2-3b]",
            "[llama-3.1-8b, llama-3.1-70b]",
            "FILE: nodes.0.devices.0.models: llama-3.1-70b spans 4 devices, this is a group of 1; "
            "change devices here or the model's tensor_parallel",
        ),
        ("disk: 6GB/s", "disk: 6GB", "FILE: nodes.0.disk: '6GB' is not a rate such as 24GB/s"),
        (
            "name: small",
            "name: small\nkv: {llama-3.1-8b: 1GiB}",
            "FILE: kv.llama-3.1-8b: 1073741824 bytes are less than one request of max_model_len "
            "(4294967296)",
        ),
        (
            "name: small",
            "name: small\nkv: {qwen2.5-7b: 1GiB}",
            "FILE: kv: there is no 'qwen2.5-7b' (known: llama-3.1-8b, llama-3.2-3b)",
        ),
        (
            "name: small",
            "name: small\nprofiles: {mine: {capacity: 1GiB, flops: 1TFLOPS}}",
            "FILE: profiles.mine: give bandwidth, memory_share, compute_share, step, to_device, "
            "to_host, allreduce, residual, start, wake, limit too, or like: the name of another "
            "one",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert refusal(tmp_path, old, new) == said


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, "name: a\n", "name: a\n    name: b\n")
    assert "the key 'name' stands twice" in said


def test_a_model_that_does_not_fit_its_device_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, "profile: a100-80g", "profile: cpu-2")
    assert said == (
        "FILE: llama-3.1-8b does not fit a/gpu0: 21.2 GiB of 12.0 GiB; take it out of models there"
    )


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no cluster 'papper', nor such a file; did you mean pap"):
        load_cluster("papper")
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.yaml"):
        load_cluster("nowhere.yaml")


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_scales_to_any_number_of_devices(name: str) -> None:
    cluster = load_cluster(name)
    for wanted in (64, 203, 1000):
        big = scaled(cluster, wanted)
        assert sum(device.devices for device in devices(big)) == wanted
        assert len({node.name for node in big.nodes}) == len(big.nodes)
        assert {m for device in devices(big) for m in device.models} == set(cluster.models)
    with pytest.raises(ConfigError, match="cannot be scaled to 0"):
        scaled(cluster, 0)


# hidden, intermediate, vocabulary, heads, bias of q/k/v, own output head: their config.json
SHAPES = {
    "llama-3.2-3b": (3072, 8192, 128_256, 24, False, False),
    "qwen2.5-7b": (3584, 18_944, 152_064, 28, True, True),
    "llama-3.1-8b": (4096, 14_336, 128_256, 32, False, True),
    "qwen2.5-14b": (5120, 13_824, 152_064, 40, True, True),
    "qwen2.5-coder-14b": (5120, 13_824, 152_064, 40, True, True),
    "qwen2.5-32b": (5120, 27_648, 152_064, 40, True, True),
    "llama-3.1-70b": (8192, 28_672, 128_256, 64, False, True),
    "llama-3.1-70b-int4": (8192, 28_672, 128_256, 64, False, True),
    "smollm2-135m": (576, 1536, 49_152, 9, False, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_weights_follow_from_the_published_shape(name: str) -> None:
    model = load_geometry(name)
    hidden, inner, vocabulary, heads, bias, own_head = SHAPES[name]
    kv = model.kv_heads * model.head_dim
    linear = 2 * hidden * heads * model.head_dim + 2 * hidden * kv + 3 * hidden * inner
    rest = 2 * hidden + (heads * model.head_dim + 2 * kv if bias else 0)
    table = vocabulary * hidden
    body = model.layers * (linear + rest) + hidden
    assert model.parameters == body + table
    loaded = model.parameters + (table if own_head else 0)
    if name == "llama-3.1-70b-int4":  # AWQ: 4 bits, a scale and a zero point for 128 weights
        packed = model.layers * linear
        sixteen = 2 * (loaded - packed)
        assert model.weights_bytes == packed // 2 + packed // 128 * 2 + packed // 256 + sixteen
    else:
        assert model.weights_bytes == loaded * (4 if name == "smollm2-135m" else 2)


def test_a_model_is_found_by_the_name_it_is_served_under() -> None:
    assert find_geometry("meta-llama/Llama-3.1-8B-Instruct") == load_geometry("llama-3.1-8b")
    assert find_geometry("Qwen/Qwen2.5-Coder-14B-Instruct") == load_geometry("qwen2.5-coder-14b")
    assert find_geometry("HuggingFaceTB/SmolLM2-135M-Instruct") == load_geometry("smollm2-135m")
    assert find_geometry("gpt-4o") is None


def test_a_geometry_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("models:\n  mine: {like: llama-3.1-8b, layers: 16}\n")
    assert load_geometry(path) == replace(load_geometry("llama-3.1-8b"), name="mine", layers=16)
    path.write_text("models: {}\n")
    with pytest.raises(ConfigError, match="give one model under models:, there are 0"):
        load_geometry(path)
