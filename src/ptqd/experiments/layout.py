"""Where the stages of a run folder stand."""

from ptqd.experiments.results import RowKey, SamplerSettings


class RunLayout:
    """Where the stages of a run folder stand, as paths inside it.

    Args:
        settings: how the rows were sampled.
    """

    def __init__(self, settings: SamplerSettings) -> None:
        self.root = settings.folder

    def quantized(self, key: RowKey) -> str:
        """The pipeline of a recipe, without a plan."""
        return f"{self.root}/{key.recipe}/quantized"

    def widths(self, key: RowKey) -> str:
        """Statistics of each width of a recipe."""
        return f"{self.root}/{key.recipe}/widths"

    def planned(self, key: RowKey) -> str:
        """The pipeline of a recipe with its plan."""
        return f"{self._of(key)}/planned"

    def noise(self, key: RowKey) -> str:
        """Statistics."""
        return f"{self._of(key)}/noise.safetensors"

    def search(self, key: RowKey) -> str:
        """The searched correction."""
        return f"{self._of(key)}/auto.json"

    def samples(self, key: RowKey) -> str:
        """The images of a row."""
        if key.is_full_precision:
            return f"{self.root}/full-precision/samples.safetensors"
        return f"{self._of(key)}/{key.correction}/samples.safetensors"

    def trajectory(self) -> str:
        """The first sample at some of its steps."""
        return f"{self.root}/steps.safetensors"

    def _of(self, key: RowKey) -> str:
        return f"{self.root}/{key.quantized.replace(' ', '-')}"
