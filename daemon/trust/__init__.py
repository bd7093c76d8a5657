"""Who belongs to the mesh: founding, joining, certificates, tokens, the state folder."""
