"""The import name of Energy-Lens: from energy_lens import EnergyLensAnalyzer, EnergyLensConfig."""

from energy_lens_minimal import SAE, EnergyTransformer, LensResults, efas
from real_model_extension import EnergyLensAnalyzer, EnergyLensConfig, LossEnergy

__all__ = [
    "SAE",
    "EnergyLensAnalyzer",
    "EnergyLensConfig",
    "EnergyTransformer",
    "LensResults",
    "LossEnergy",
    "efas",
]
