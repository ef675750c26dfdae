"""The study: experiments that test the claims, with their controls."""
