-- Writes values that have not changed since they were read: checkpoints after the first one, and delivery logs.
--
-- KEYS    one for each value
-- ARGV    1 life in ms; then two for each value: the expected one, the new one
-- result  one for each value: '' if it was written, else the value that is there
local results = {}
for i = 1, #KEYS do
  local expected, value = ARGV[i * 2], ARGV[i * 2 + 1]
  local existing = redis.pcall('GET', KEYS[i])
  if type(existing) ~= 'string' or existing == expected or existing == value then
    redis.call('SET', KEYS[i], value, 'PX', ARGV[1])
    results[i] = ''
  else
    results[i] = existing
  end
end
return results
