"""What is one part says so in every output, and only on request if it is not understood."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

import lmtt
from lmtt.errors import StructureError
from lmtt.graph.export import route_json
from lmtt.terminal import show
from lmtt.testing_models import tiny_model, tiny_prompt
from lmtt.viz.page import route_page


@pytest.fixture(scope="module")
def spoiled() -> Any:
    """Experts whose neurons do not add up to what they return."""
    model = tiny_model("mixtral", layers=2)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _m, _args, out: 2 * out, prepend=True)
    return model


def test_it_is_refused_unless_asked_for(spoiled: Any) -> None:
    with pytest.raises(StructureError, match=r"layer 0 \(\w+\), mlp\.experts .*--opaque"):
        lmtt.load(spoiled).trace(input_ids=tiny_prompt()[0])


def test_every_output_marks_it(spoiled: Any) -> None:
    trace = lmtt.load(spoiled, opaque=True).trace(input_ids=tiny_prompt()[0])
    marks = [(s["layer"], s["sublayer"], s["kind"]) for s in trace.whole_sublayers]
    assert marks == [(0, "mlp.experts", "opaque"), (1, "mlp.experts", "opaque")]
    route = trace.route(len(trace.tokens) - 1, 0.05)
    assert route_json(route)["whole_sublayers"] == trace.whole_sublayers
    text = io.StringIO()
    show(trace, route, file=text)
    assert "one part in 2 layers: mlp.experts (opaque" in text.getvalue()
    assert "one part in 2 layers: mlp.experts (opaque" in route_page(route)
    assert np.isfinite(trace.mlp).all()
    assert trace.mlp.max() > 0  # still a part of the whole


def test_a_mixer_is_a_part_of_its_own_kind_and_marked() -> None:
    trace = lmtt.load(tiny_model("qwen3_next")).trace(input_ids=tiny_prompt()[0])
    (mark,) = trace.whole_sublayers
    assert (mark["layer"], mark["kind"]) == (0, "mixer")
    assert trace.opaque[0].max() > 0
    assert trace.opaque[1].max() == 0
