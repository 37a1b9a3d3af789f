"""A user's mistake is refused in one line that says what is wrong."""

import pytest

from qtrain.errors import UsageError


def refused(call, *pieces):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message
    return message
