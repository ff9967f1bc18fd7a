# docker build -t loraplex . && docker run -p 8000:8000 loraplex                 the demo
# docker run -p 8000:8000 -v ./my:/srv/my loraplex serve --config /srv/my/loraplex.toml
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev   # for the kernels in C
WORKDIR /src
COPY . .
RUN python -m venv /opt/loraplex && /opt/loraplex/bin/pip install --no-cache-dir .

FROM python:3.11-slim
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PATH=/opt/loraplex/bin:$PATH
COPY --from=build /opt/loraplex /opt/loraplex
RUN useradd --create-home --uid 10001 loraplex
USER loraplex
WORKDIR /home/loraplex
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"
ENTRYPOINT ["loraplex"]
CMD ["demo", "--host", "0.0.0.0"]
