"""The sole owner of truth about requests, rows and KV pages: decides every step, computes none. No torch."""
