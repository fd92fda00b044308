-- Writes all API keys back after Redis lost its last writes, or all of its data. A value of another type in their place
-- is moved aside for a week.
--
-- KEYS    1 hash of the API keys, see change_key.lua; 2 name of a value that is moved aside
-- ARGV    1 the version that an instance has in memory; then fields and values of the whole hash
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'hash' and kind ~= 'none' then
  redis.call('RENAME', KEYS[1], KEYS[2])
  redis.call('EXPIRE', KEYS[2], 604800)
end
if (number_of(redis.call('HGET', KEYS[1], 'version'), MAX_VERSION) or 0) >= tonumber(ARGV[1]) then return false end
redis.call('DEL', KEYS[1])
for number = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[number], ARGV[number + 1]) end
return false
