"""How a method of the stand-in for Modal answers: with a message, or with several."""

import inspect


def rpc(function):
    async def method(self, stream):
        request = await stream.recv_message()
        answer = function(self, request)
        if inspect.isasyncgen(answer):
            async for each in answer:
                await stream.send_message(each)
        else:
            await stream.send_message(await answer if inspect.isawaitable(answer) else answer)

    return method
