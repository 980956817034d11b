"""Prompts with images as a worker gets them, and as transformers does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srt.configs.plan import ImageConfig
from srt.messages import ImageSpan
from srt.tiles import TileFiles
from srt.tokenizer.images import Views, make_views
from srt.tokenizer.layout import ImageTokenIds, image_token_ids
from tests.support.pictures import ROOMY, file_of


class ImagePrompt:
    """Token ids with images in between, whose tiles are in the files of `rundir`.

    `marks` are the tokens that images are written with; without any they lie below the placeholder.
    """

    def __init__(
        self,
        parts: Sequence[list[int] | Image.Image],
        config: ImageConfig,
        rundir: Path,
        marks: ImageTokenIds | None = None,
    ) -> None:
        self._config = config
        files = TileFiles(rundir, config)
        files.make()
        last = config.image_token_id
        marks = marks or ImageTokenIds(last, *(last - at for at in range(1, 6)))
        self.tokens: list[int] = []
        self.spans: list[ImageSpan] = []
        self.views: list[Views] = []
        for part in parts:
            if isinstance(part, list):
                self.tokens += part
                continue
            views = make_views(file_of(part), config, ROOMY, "vendor")
            files.write(views.key(), views.buffers(), "test")
            ids = image_token_ids(views.columns, views.rows, config, marks)
            self.spans.append(ImageSpan(views.key(), len(self.tokens), len(ids), views.columns, views.rows))
            self.views.append(views)
            self.tokens += ids

    @property
    def packed(self) -> bytes:
        """The ids as they travel."""
        return array("i", self.tokens).tobytes()

    def logits(self, truth: Any, more: Sequence[int] = ()) -> Tensor:
        """Logits of all tokens by transformers, of the prompt and of `more` tokens behind it."""
        crops = [crop for views in self.views for crop in views.crops]
        inputs: dict[str, Any] = {"pixel_values": self._pixels(np.concatenate([views.view for views in self.views]))}
        if crops:
            inputs["pixel_values_local"] = self._pixels(np.stack(crops))
            inputs["num_local_patches"] = [len(views.crops) for views in self.views]
        ids = torch.tensor([[*self.tokens, *more]])
        with torch.inference_mode():
            logits: Tensor = truth(input_ids=ids, use_cache=False, **inputs).logits[0]
        return logits

    def _pixels(self, views: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self._config.mean, self._config.std))
        return (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - mean) / std
