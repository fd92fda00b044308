-- Tries, on its own keys, the commands that the queue needs, and leaves nothing behind.
-- KEYS: a stream, a string, a sorted set, a list; none of them is used by anything else
-- Returns a list of {command, error} for those that failed.

local stream, text, set, list = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local failed = {}

local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    failed[#failed + 1] = {(...), reply.err}
    return nil
  end
  return reply
end

try('XGROUP', 'CREATE', stream, 'g', '0', 'MKSTREAM')
local entry = try('XADD', stream, '*', 'v', '0') or '0-1'
try('XREADGROUP', 'GROUP', 'g', 'c', 'COUNT', 1, 'STREAMS', stream, '>')
try('XPENDING', stream, 'g', '-', '+', 1)
try('XCLAIM', stream, 'g', 'c', 0, entry)
try('XINFO', 'GROUPS', stream)
try('XINFO', 'CONSUMERS', stream, 'g')
try('XGROUP', 'DELCONSUMER', stream, 'g', 'nobody')
try('XRANGE', stream, '-', '+', 'COUNT', 1)
try('XREVRANGE', stream, '+', '-', 'COUNT', 1)
try('XLEN', stream)
try('XACK', stream, 'g', entry)
try('XDEL', stream, entry)
try('EXPIRE', stream, 60)
try('SET', text, 'v', 'NX', 'GET', 'PX', 60000)
try('SET', text, 'v', 'XX', 'GET', 'KEEPTTL')
try('GET', text)
try('MGET', text)
try('EXISTS', text)
try('PEXPIRE', text, 60000)
try('PTTL', text)
try('TYPE', text)
try('BITFIELD', text, 'INCRBY', 'i64', '#0', 1)
try('PEXPIREAT', text, 1)
try('ZADD', set, 1, 'm')
try('ZINCRBY', set, 1, 'm')
try('ZRANGE', set, 0, 0, 'WITHSCORES')
try('ZRANGEBYSCORE', set, '-inf', '+inf', 'LIMIT', 0, 1)
try('ZSCORE', set, 'm')
try('ZCARD', set)
try('EXPIRE', set, 60)
try('ZREM', set, 'm')
try('HSET', set, 'f', 'v')
try('HGET', set, 'f')
try('HMGET', set, 'f')
try('HGETALL', set)
try('HSCAN', set, 0, 'COUNT', 1)
try('HINCRBY', set, 'n', 1)
try('EXPIRE', set, 60)
try('HDEL', set, 'f')
try('LPUSH', list, 'v')
try('LTRIM', list, 0, 0)
try('LLEN', list)
try('RPUSH', list, 'v')
try('LRANGE', list, 0, 0)
try('LINDEX', list, 0)
try('LPOP', list, 2)
try('SADD', list, 'm')
try('SMEMBERS', list)
try('EXPIRE', list, 60)
try('SREM', list, 'm')
try('TIME')
try('SET', text, 'v', 'PX', 60000)
try('RENAME', text, list)
try('DEL', stream, text, set)
try('UNLINK', list)
return failed
