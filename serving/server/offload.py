"""What would hold up the event loop, and with it every other request, is done on a thread."""

import asyncio

LARGE = 2**18  # bytes; decoding more than this would hold up the other requests


def are_large(outputs):
    """Whether a model's outputs, arrays by alias, are so large that a thread is to write the answer."""
    return sum(value.size for value in outputs.values()) > LARGE // 8


async def off_loop_if(large, function, *arguments):
    """Call `function`, on a thread where that is called for; returns what it returns."""
    if large:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)
