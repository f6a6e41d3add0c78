"""Stop strings, found wherever the tokens' borders lie."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.base.generate.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 12), max_size=6))
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    """Law: however the text is cut into pieces, what is shown is what stands before the first stop string in the whole."""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    seen, stopped, finder = "", False, StopStrings(stops)
    for piece in pieces:
        more, stopped = finder.push(piece)
        seen += more
        if stopped:
            break
    else:
        seen += finder.flush()
    # A shorter stop that begins later may end earlier, so the first piece that completes one decides: compare with the
    # text up to there.
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert seen == text
    else:
        assert text.startswith(seen)
        assert any(text.startswith(stop, len(seen)) for stop in stops)


def test_only_what_may_become_a_stop_waits() -> None:
    """Worked by hand: `ab` holds back an `a` at the end and nothing else."""
    finder = StopStrings(["ab", "xyz"])
    assert finder.push("ca") == ("c", False)
    assert finder.push("axy") == ("aa", False)
    assert finder.push("q") == ("xyq", False)
    assert finder.push("_a") == ("_", False)
    assert finder.push("b!") == ("", True)
    assert finder.flush() == ""
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings([""])
