"""The parts that generated modules are put together from, each a piece of Triton source."""
