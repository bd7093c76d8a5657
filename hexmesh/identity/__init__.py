"""Who is who: node keys, the mesh's authority, certificates and join tokens. Pure: time is handed in."""
