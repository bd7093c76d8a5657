"""Pictures of plans and simulations. matplotlib is imported here alone, and only when a picture is asked for."""
