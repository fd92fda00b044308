-- Renames keys of another type than the queue needs, so that the service can go on. Operators find them there for
-- a week.
--
-- KEYS    two for each key: its name, its new name
-- ARGV    1 life of a renamed key in seconds; then the required type of each key
-- result  the keys that were renamed
local moved = {}
for i = 1, #KEYS / 2 do
  local kind = redis.call('TYPE', KEYS[i * 2 - 1]).ok
  if kind ~= 'none' and kind ~= ARGV[i + 1] then
    redis.call('RENAME', KEYS[i * 2 - 1], KEYS[i * 2])
    redis.call('EXPIRE', KEYS[i * 2], ARGV[1])
    moved[#moved + 1] = KEYS[i * 2 - 1]
  end
end
return moved
