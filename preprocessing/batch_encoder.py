"""Batches through the encoder: a GPU has one under way while it is handed the next; one that is too large is halved."""

import gc
import logging
from dataclasses import dataclass

import numpy as np
import torch

from acmil.preprocessing.encoders import Encoder, EncoderError

logger = logging.getLogger(__name__)

# On a CPU: as fast as 64, and fresh memory, which costs more than the first batch's arithmetic, is a quarter of it
# (`docs/experiments.md`).
_MOST_TILES_ON_CPU = 16


@dataclass(frozen=True)
class PendingFeatures:
    """Features that the device may still be computing."""

    parts: tuple[torch.Tensor, ...]  # each (b, D), on the CPU
    tiles: torch.Tensor  # kept until the device has read them
    arrived: torch.cuda.Event | None  # when the parts have been written; None: they have been

    def result(self) -> np.ndarray:
        """Wait for the features, (B, D)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return torch.cat(self.parts).numpy()


class BatchEncoder:
    """An encoder that takes batches of any size that fits, and less where that does not fit.

    Args:
        encoder: The network.
        feature_dtype: "float16" or "float32": type of the features returned.
        batch_size: Tiles in a full batch, which a CPU takes 16 at a time; a compiled network gets no other number, as
            it is compiled for one.
    """

    def __init__(self, encoder: Encoder, *, feature_dtype: str, batch_size: int) -> None:
        self._encoder = encoder
        self._dtype: torch.dtype = getattr(torch, feature_dtype)
        self._most_tiles = min(batch_size, _MOST_TILES_ON_CPU) if encoder.device.type == "cpu" else batch_size
        self._copies = torch.cuda.Stream(encoder.device) if encoder.device.type == "cuda" else None

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Make an uint8 array; for a GPU in page-locked memory, which it copies from while the CPU goes on."""
        is_pinned = self._encoder.device.type == "cuda"
        return torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned).numpy()

    def pin(self, array: np.ndarray) -> None:
        """Lock an array's memory in place, for a GPU to copy from while the CPU goes on; nothing for a CPU."""
        if self._copies is not None:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)))

    def unpin(self, array: np.ndarray) -> None:
        """Undo `pin`."""
        if self._copies is not None:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)))

    def warm_up(self, tile_px: int) -> None:
        """Encode a full batch of black tiles, so that compilation and a GPU's first use come before the slides."""
        self.begin(np.zeros((self._most_tiles, tile_px, tile_px, 3), np.uint8)).result()

    def begin(self, tiles: np.ndarray) -> PendingFeatures:
        """Hand tiles (B, H, W, 3) uint8 to the device.

        Raises:
            EncoderError: If not even one tile fits into the GPU's memory.
        """
        batch = torch.from_numpy(tiles)
        on_device = self._copied(batch)
        while True:
            parts = self._parts(on_device)
            if parts is not None:
                return self._pending(parts, batch)
            self._halve()

    def _pending(self, parts: tuple[torch.Tensor, ...], batch: torch.Tensor) -> PendingFeatures:
        """Have the features sent to the CPU at once: asked for later, they would queue behind the next batch's work."""
        if self._copies is None:
            return PendingFeatures(parts, batch, None)
        on_cpu = tuple(torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts)
        for target, part in zip(on_cpu, parts, strict=True):
            target.copy_(part, non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(self._encoder.device))
        return PendingFeatures(on_cpu, batch, arrived)

    def _copied(self, batch: torch.Tensor) -> torch.Tensor:
        """Copy a batch to a GPU while that is still at the one before; on a CPU it is there already."""
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):
            on_device = batch.to(self._encoder.device, non_blocking=True)
        computing = torch.cuda.current_stream(self._encoder.device)
        computing.wait_stream(self._copies)
        on_device.record_stream(computing)
        return on_device

    def _parts(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Run the network on parts that fit; None if one of them did not."""
        try:
            return tuple(self._features(part) for part in batch.split(self._most_tiles))
        except torch.OutOfMemoryError as error:
            if self._most_tiles == 1:
                raise EncoderError(
                    f"a tile must fit into the GPU's memory, not even one does: {error} "
                    "Free the GPU of other programs, take a smaller encoder, or --device cpu."
                ) from error
            return None  # retried outside, where the error no longer keeps the network's tensors alive

    def _features(self, part: torch.Tensor) -> torch.Tensor:
        n_tiles = len(part)
        if self._encoder.is_compiled and n_tiles < self._most_tiles:
            part = torch.cat([part, part.new_zeros(self._most_tiles - n_tiles, *part.shape[1:])])
        # torch turns what float16 cannot hold into infinity, which the feature file refuses
        return self._encoder.begin(part)[:n_tiles].to(self._dtype)

    def _halve(self) -> None:
        before, self._most_tiles = self._most_tiles, max(1, self._most_tiles // 2)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where no GPU is in use
        logger.warning(
            "%d tiles at a time do not fit into the GPU's memory: going on with %d. --batch-size %d says so from the "
            "start, which also keeps the last bits of the features the same in each run.",
            before,
            self._most_tiles,
            self._most_tiles,
        )
