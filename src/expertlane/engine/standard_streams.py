"""Standard streams that a program was started without."""

import os


def fill_closed() -> None:
    """Open /dev/null in place of each closed one of the first three descriptors.

    Else the next file opened would get its number, and with it what is printed, here or by a child
    process.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
