"""Why a model attends as it does: sinks, dormant heads, and a toy task that grows them."""
