"""Files of requests in OpenAI's batch format, answered in order, to be gone on with after a kill.

``files`` reads requests and what is answered already; ``run`` answers the rest through the server's own application.
"""
