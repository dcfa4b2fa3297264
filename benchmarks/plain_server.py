"""The least that serves the model file that MODEL names: the peer of `serving`.

`uvicorn benchmarks.plain_server:app` takes the bytes of an image file, not a table of them.
"""

import asyncio
import os

from fastapi import FastAPI, Request

from cnnpipe.serving import Predictor

predictor = Predictor.load(os.environ["MODEL"])
app = FastAPI()


@app.get("/ping")
async def ping() -> str:
    """That it is there."""
    return "here"


@app.post("/invocations")
async def probabilities(request: Request) -> dict[str, float]:
    """The probability of each class."""
    data = await request.body()
    (row,) = await asyncio.to_thread(predictor.predict, [data])
    return dict(zip(predictor.class_names, map(float, row), strict=True))
