"""What Redis does at one stroke. Every bucket is a hash; the keys of one call share a tenant, and so a cluster's slot.

A rate's hash holds `tat`, the time in milliseconds at which all that was taken will have refilled. A budget's and a
concurrency limit's hash holds for each process P what it has, `h:P`, and until when, `d:P`; a budget's `spent` beside
it. `q:P` numbers the last settlement of P, so that one that is sent again changes nothing.
"""

from __future__ import annotations

_COMMON = """
local process, given, hold_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local now = given ~= '' and tonumber(given) or (tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
local MINUTE = 60000
local function number(value) return tonumber(value or '0') or 0 end
local function write_rate(key, tat)
  redis.call('HSET', key, 'tat', string.format('%.3f', tat))
  redis.call('PEXPIRE', key, math.ceil(math.max(tat - now, 0)) + 2 * MINUTE)
end
local function keep(key, expire_ms)  -- long enough after its period that nothing in flight finds it gone
  redis.call('PEXPIRE', key, expire_ms)
end
local function held(key)
  local fields, total = redis.call('HGETALL', key), 0
  local amounts, deadlines = {}, {}
  for i = 1, #fields, 2 do
    local kind, owner = string.sub(fields[i], 1, 2), string.sub(fields[i], 3)
    if kind == 'h:' then amounts[owner] = tonumber(fields[i + 1]) end
    if kind == 'd:' then deadlines[owner] = tonumber(fields[i + 1]) end
  end
  for owner, amount in pairs(amounts) do
    if (deadlines[owner] or 0) < now then
      redis.call('HDEL', key, 'h:' .. owner, 'd:' .. owner, 'q:' .. owner)
    else
      total = total + amount
    end
  end
  return total
end
"""

# ARGV: process, now, hold, may owe, then for each bucket: family, limit, need, extra, expiry.
# Answers {"ok", now, extra and remaining of each}, {"refused", now, which, wait} or {"seed", now, which}. The wait is
# in milliseconds, and -1 where so much is spent that nothing which comes back makes room.
LEASE = (
    _COMMON
    + """
local may_owe = ARGV[4] == '1'
for i, key in ipairs(KEYS) do  -- the process lives, whether or not it is granted more
  local at = 5 + (i - 1) * 5
  if ARGV[at] ~= 'rate' and redis.call('HEXISTS', key, 'h:' .. process) == 1 then
    redis.call('HSET', key, 'd:' .. process, now + hold_ms)
    keep(key, ARGV[at + 4])
  end
end
local plans = {}
for i, key in ipairs(KEYS) do
  local at = 5 + (i - 1) * 5
  local family, limit, need, extra = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local left, tat
  if family == 'rate' then
    tat = math.max(number(redis.call('HGET', key, 'tat')), now)
    left = limit * (1 - (tat - now) / MINUTE)
    if not may_owe and need > left + 1e-3 then
      return {'refused', now, i, math.ceil((need - left) * MINUTE / limit)}
    end
  else
    if family == 'budget' and redis.call('HEXISTS', key, 'spent') == 0 then return {'seed', now, i} end
    local unspent = limit - number(redis.call('HGET', key, 'spent'))
    left = unspent - held(key)
    if need > left then return {'refused', now, i, need > unspent and -1 or 1000} end
  end
  extra = math.max(0, math.min(extra, math.floor((left - need) / 16)))
  plans[i] = {key = key, family = family, limit = limit, take = need + extra, extra = extra, tat = tat,
              left = left - need - extra, expire = ARGV[at + 4]}
end
local answer = {'ok', now}
for i, plan in ipairs(plans) do
  if plan.family == 'rate' then
    write_rate(plan.key, plan.tat + plan.take * MINUTE / plan.limit)
  else
    redis.call('HINCRBY', plan.key, 'h:' .. process, plan.take)
    redis.call('HSET', plan.key, 'd:' .. process, now + hold_ms)
    keep(plan.key, plan.expire)
  end
  answer[#answer + 1] = plan.extra
  answer[#answer + 1] = math.floor(math.max(plan.left, 0))
end
return answer
"""
)

# ARGV: process, now, hold, family, limit, sequence, spent, returned, expiry.
SETTLE = (
    _COMMON
    + """
local key, family, limit, sequence = KEYS[1], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local spent, returned = tonumber(ARGV[7]), tonumber(ARGV[8])
if number(redis.call('HGET', key, 'q:' .. process)) >= sequence then return 0 end
if family == 'rate' then
  write_rate(key, math.max(number(redis.call('HGET', key, 'tat')), now) - returned * MINUTE / limit)
else
  if spent > 0 and redis.call('HEXISTS', key, 'spent') == 1 then redis.call('HINCRBY', key, 'spent', spent) end
  if redis.call('HEXISTS', key, 'h:' .. process) == 1 then
    local rest = redis.call('HINCRBY', key, 'h:' .. process, -(spent + returned))
    if rest <= 0 then redis.call('HDEL', key, 'h:' .. process, 'd:' .. process) end
  end
  keep(key, ARGV[9])
end
redis.call('HSET', key, 'q:' .. process, sequence)
return 1
"""
)

# ARGV: process, now, hold, held, expiry. What the process holds, said anew: it lives, and knows best.
RENEW = (
    _COMMON
    + """
redis.call('HSET', KEYS[1], 'h:' .. process, ARGV[4], 'd:' .. process, now + hold_ms)
keep(KEYS[1], ARGV[5])
return 1
"""
)

# ARGV: process, now, hold, spent, expiry. Only the first to come is believed.
SEED = (
    _COMMON
    + """
redis.call('HSETNX', KEYS[1], 'spent', ARGV[4])
keep(KEYS[1], ARGV[5])
return 1
"""
)

# ARGV: process, now, hold, spent. At least so much is spent, where anything is counted: what a killed process held has
# lapsed, and some of it was used. What another process settled just now may be counted twice, never too little.
CORRECT = (
    _COMMON
    + """
local known = redis.call('HGET', KEYS[1], 'spent')
if known and number(known) < tonumber(ARGV[4]) then redis.call('HSET', KEYS[1], 'spent', ARGV[4]) end
return 1
"""
)
