"""Pictures show the values they are given."""

import pytest

from tinygpt.figures import training_curves, training_page

LINES = [{"step": 10, "tokens": 100, "train_loss": 9.0, "lr": 0.1},
         {"step": 20, "tokens": 200, "train_loss": 8.0, "lr": 0.2},
         {"step": 20, "tokens": 200, "validation_loss": 8.5, "validation_perplexity": 4900.0,
          "replies": {"Hello <b>": "1 < 2 & <script>alert(1)</script>"}}]


def test_the_curves_are_the_lines_of_the_log():
    shown = {trace.name: (tuple(trace.x), tuple(trace.y)) for trace in training_curves(LINES).data}
    assert shown == {"training, with dropout": ((100, 200), (9.0, 8.0)), "validation": ((200,), (8.5,)),
                     "perplexity": ((200,), (4900.0,)), "learning rate": ((100, 200), (0.1, 0.2))}


@pytest.mark.parametrize("lines", [LINES, LINES[:1], []])
def test_the_page_shows_replies_as_text(lines):
    page = training_page(lines, "run <1>")
    assert "<h1>run &lt;1&gt;</h1>" in page and "<script>alert" not in page
    assert ("1 &lt; 2 &amp; &lt;script&gt;" in page) == (len(lines) == 3)
