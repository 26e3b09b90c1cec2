"""The identity of a run: the same for the same work, another for other weights, examples or settings."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import torch

from laconic.evaluation import provenance

TASK = SimpleNamespace(name="mine", metric="exact")


def items(prompt: str = "a prompt") -> list[SimpleNamespace]:
    return [SimpleNamespace(example=SimpleNamespace(prompt=prompt, answer="x", choices=None), prefill=3, limit=4, inputs={})]


def test_identity_is_stable_and_json(tiny, tiny_path: str) -> None:
    first = provenance.identify(tiny[0], "tiny", TASK, items(), {"seed": 0})
    second = provenance.identify(copy.deepcopy(tiny[0]), "tiny", TASK, items(), {"seed": 0})
    assert first == second and json.loads(json.dumps(first)) == first


def test_a_model_read_from_disk_is_the_same_model(tiny, tiny_path: str) -> None:
    from transformers import AutoModelForCausalLM

    assert provenance.weights_digest(AutoModelForCausalLM.from_pretrained(tiny_path)) == provenance.weights_digest(
        tiny[0]
    )


def test_what_makes_another_run(tiny) -> None:
    base = provenance.identify(tiny[0], "tiny", TASK, items(), {"seed": 0})

    def changed(**other: object) -> set[str]:
        arguments = {"network": tiny[0], "items": items(), "settings": {"seed": 0}} | other
        found = provenance.identify(arguments["network"], "tiny", TASK, arguments["items"], arguments["settings"])
        return {key for key in base if base[key] != found[key]}

    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    config = copy.deepcopy(tiny[0])
    config.config.rope_parameters = {**config.config.rope_parameters, "rope_theta": 5.0}
    assert changed() == set()
    assert changed(network=other) == {"weights"} == changed(network=config)
    assert changed(items=items("another")) == {"examples"}
    assert changed(settings={"seed": 1}) == {"seed"}


def test_machine_is_json_and_tells_threads() -> None:
    found = json.loads(json.dumps(provenance.machine()))
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["cpu"] in found["device"]


def test_shell_command_can_be_pasted() -> None:
    assert provenance.shell_command(["compare", "--methods", "a(x=1)"]) == "laconic compare --methods 'a(x=1)'"
