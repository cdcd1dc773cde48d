"""The GPU side: sessions that serve one client each."""
