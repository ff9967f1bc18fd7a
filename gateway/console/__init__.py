"""loraplex tenants | keys | limits | …: operators' commands, which speak the admin REST API and know nothing else."""
