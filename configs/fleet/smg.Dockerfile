# Shepherd Model Gateway, in the version that `make fleet` runs.
FROM python:3.12-slim
RUN pip install --no-cache-dir smg==1.13.0
USER nobody
ENTRYPOINT ["smg", "launch"]
