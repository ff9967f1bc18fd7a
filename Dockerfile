# docker build -t loraplex . && docker run -p 8000:8000 loraplex                 the demo
# docker run -p 8000:8000 -v ./my:/srv/my loraplex serve --config /srv/my/loraplex.toml
# On a GPU: --gpus all, and -v triton:/home/loraplex/.triton keeps compiled kernels for the next start.
FROM python:3.11-slim AS base
# A compiler: for the kernels in C, and on a GPU for what launches Triton's, which it builds where it runs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/loraplex && /opt/loraplex/bin/pip install --no-cache-dir .

FROM base
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PATH=/opt/loraplex/bin:$PATH
COPY --from=build /opt/loraplex /opt/loraplex
RUN useradd --create-home --uid 10001 loraplex
USER loraplex
WORKDIR /home/loraplex
RUN mkdir .triton
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"
ENTRYPOINT ["loraplex"]
CMD ["demo", "--host", "0.0.0.0"]
