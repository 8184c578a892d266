"""Where the stages of a run folder stand."""

from collections.abc import Sequence

from ptqd.experiments.results import RowKey, SamplerSettings
from ptqd.names import folder_name


class RunLayout:
    """Where the stages of a run folder stand, as paths inside it; every label is a folder's name of its own.

    Args:
        settings: how the rows were sampled.
    """

    def __init__(self, settings: SamplerSettings) -> None:
        self.root = folder_name(settings.folder)

    def quantized(self, key: RowKey) -> str:
        """The pipeline of a recipe, without a plan."""
        return f"{self.root}/{folder_name(key.recipe)}/quantized"

    def widths(self, key: RowKey) -> str:
        """Statistics of each width of a recipe."""
        return f"{self.root}/{folder_name(key.recipe)}/widths"

    def planned(self, key: RowKey) -> str:
        """The pipeline of a recipe with its plan."""
        return f"{self.of(key)}/planned"

    def noise(self, key: RowKey) -> str:
        """Statistics."""
        return f"{self.of(key)}/noise.safetensors"

    def search(self, key: RowKey, methods: Sequence[str]) -> str:
        """The correction that runs gave: auto's, or that of named methods."""
        return f"{self.of(key)}/{','.join(methods)}.json"

    def reached(self, key: RowKey) -> str:
        """What came of a plan's expectation."""
        return f"{self.of(key)}/reached.json"

    def samples(self, key: RowKey) -> str:
        """The images of a row."""
        if key.is_full_precision:
            return f"{self.root}/full-precision/samples.safetensors"
        return f"{self.of(key)}/{folder_name(key.correction)}/samples.safetensors"

    def trajectory(self) -> str:
        """The first sample at some of its steps."""
        return f"{self.root}/steps.safetensors"

    def of(self, key: RowKey) -> str:
        """The folder of a recipe, or of a recipe with its plan; a name never has the ``@`` between them."""
        name = folder_name(key.recipe)
        return f"{self.root}/{name}" if key.plan is None else f"{self.root}/{name}@{folder_name(key.plan)}"
