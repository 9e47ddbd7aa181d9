"""What an answer on a terminal must keep to."""

MOST_LINES, MOST_COLUMNS = 40, 80


def fits_a_screen(out: str) -> bool:
    """Whether it is seen at once: few lines, none too wide, none with blanks at its end."""
    lines = out.splitlines()
    assert len(lines) <= MOST_LINES, out
    assert max(map(len, lines)) <= MOST_COLUMNS, out
    assert [line for line in lines if line != line.rstrip()] == [], out
    return True
